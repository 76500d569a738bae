from __future__ import annotations

import pytest

from penstock.engine.draft_tree import depths, first_children, follow, is_tree, path_of, seen_bits
from penstock.engine.speculation.interface import Draft

#            ┌ 1 ─ 3
# ROOT ─ 0 ──┴ 2 ─ 4        and 5 beside 0
PARENTS = (-1, 0, 0, 1, 2, -1)
DRAFT = (7, 8, 9, 8, 8, 6)


def test_a_path_goes_along_what_is_drawn() -> None:
    assert path_of(DRAFT, PARENTS, [7, 9, 8, 1]) == (0, 2, 4)
    assert path_of(DRAFT, PARENTS, [7, 8, 8]) == (0, 1, 3)
    assert path_of(DRAFT, PARENTS, [6, 7]) == (5,)
    assert path_of(DRAFT, PARENTS, [8]) == ()
    assert path_of((7, 8), (), [7, 8, 9]) == (0, 1)
    assert path_of((7, 8), (), [8]) == ()
    assert path_of((), (), [8]) == ()


def test_of_two_siblings_with_one_token_the_first_counts() -> None:
    assert follow((5, 5), (-1, -1), -1, 5) == 0


def test_depths_bits_and_first_children() -> None:
    assert depths(PARENTS) == [0, 1, 1, 2, 2, 0]
    assert seen_bits(PARENTS, 0) == [0b1, 0b11, 0b101, 0b1011, 0b10101, 0b100000]
    assert seen_bits((-1, 0, -1), 2) == [0b111, 0b1111, 0b10011]
    assert first_children(PARENTS) == [True, True, False, True, True, False]


@pytest.mark.parametrize(("parents", "count", "holds"), [((-1, 0), 2, True), ((-1, 1), 2, False), ((-1,), 2, False)])
def test_a_parent_stands_before_its_children(parents: tuple[int, ...], count: int, holds: bool) -> None:
    assert is_tree(parents, count) == holds


def test_parts_of_a_draft_are_drafts() -> None:
    draft = Draft(DRAFT, (0, 1, 2, 3, 4, 5), PARENTS)
    assert (draft[:3].token_ids, draft[:3].parents) == ((7, 8, 9), (-1, 0, 0))
    some = draft.only([0, 2, 4, 5])
    assert (some.token_ids, some.kinds, some.parents) == ((7, 9, 8, 6), (0, 2, 4, 5), (-1, 0, 1, -1))
    assert draft.only([0, 2, 4]) == Draft((7, 9, 8), (0, 2, 4))
    assert draft.trunk() == Draft((7, 8, 8), (0, 1, 3))
    assert Draft((1, 2), (0, 0)).only([0]) == Draft((1,), (0,))
