"""Combs: a chain with the runners-up of each place beside it."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.engine.speculation import comb
from penstock.engine.speculation.comb import Comb
from penstock.engine.speculation.interface import MAX_DRAFT_TOKENS


def test_ranked_finds_the_highest_and_leaves_the_scores_as_they_were() -> None:
    scores = np.array([0.5, 3.0, -1.0, 2.0, 2.5], np.float32)
    before = scores.copy()
    assert comb.ranked(scores, 1, 2) == [1, 4, 3]
    assert (scores == before).all()
    assert sorted(comb.ranked(scores, 1, 9)) == [0, 1, 2, 3, 4]


def test_shares_are_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.1, 0.1, 0.7]], np.float32)) + 90
    found = comb.shares_of(logits, [[0, 1], [3, 0]])
    assert found == [pytest.approx([0.5, 0.25], rel=1e-5), pytest.approx([0.7, 0.1], rel=1e-5)]


def test_a_comb_is_a_chain_with_leaves_behind_it() -> None:
    grown = Comb()
    grown.grow([7, 8, 9], [0.6, 0.3, 0.01])  # the last one is too unlikely
    grown.grow([4, 5, 6], [0.95, 0.02, 0.01])
    grown.grow([1, 2, 3], [0.4, 0.3, 0.2])
    draft = grown.draft(3)
    assert (draft.token_ids, draft.parents) == ((7, 4, 1, 8, 2, 3), (-1, 0, 1, -1, 1, 1))
    assert len(set(draft.kinds)) == 6
    assert (grown.draft(2).token_ids, grown.draft(2).parents) == ((7, 4, 8), (-1, 0, -1))
    assert draft.trunk().token_ids == (7, 4, 1)
    assert draft.trunk().parents == ()


def test_a_comb_without_leaves_is_a_chain() -> None:
    grown = Comb()
    grown.grow([7, 8, 9], [0.99, 0.005, 0.001])
    assert (grown.draft(4).token_ids, grown.draft(4).parents) == ((7,), ())


def test_kinds_are_apart_and_guess_what_they_stand_for() -> None:
    places = range(MAX_DRAFT_TOKENS)
    seen = {comb.chain_kind(place, (n + 0.5) / 8) for place in places for n in range(8)}
    leaves = {comb.leaf_kind(runner, place, 0.7 * 0.5**n) for runner in (1, 2) for place in places for n in range(5)}
    assert len(seen) + len(leaves) == comb.NUM_KINDS == len(seen | leaves)
    assert None not in leaves
    assert comb.first_guess(comb.chain_kind(3, 0.8)) == pytest.approx(0.8125)
    kind = comb.leaf_kind(2, 5, 0.3)
    assert kind is not None
    assert comb.first_guess(kind) == pytest.approx(0.375)
    assert comb.leaf_kind(1, 0, 0.5**5 / 1.01) is None
    assert comb.leaf_kind(1, 0, 0.0) is None
