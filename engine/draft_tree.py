"""The shape of a draft. Token i of it follows token parents[i], or the sequence's last one where that is ROOT:

                  ┌ b            draft    a   b   c   d
    last token ─ a ┴ c ─ d       parents -1   0   0   2

Without parents it is a chain: each token follows the one before it. A parent stands before its children, so the first
n tokens of a draft are a draft.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Parents = tuple[int, ...]

ROOT = -1
CHAIN: Parents = ()
MAX_TREE_ROWS = 16  # new tokens of a sequence that kernels see as a tree (`kernels.paged_attention.plan.SHORT_QUERY`)


def is_tree(parents: Sequence[int], num_tokens: int) -> bool:
    """Whether so many tokens may have these parents."""
    return len(parents) == num_tokens and all(ROOT <= parent < n for n, parent in enumerate(parents))


def follow(draft: Sequence[int], parents: Sequence[int], at: int, token_id: int) -> int | None:
    """The drafted token behind the one `at` that is `token_id`; None where none is."""
    if not parents:
        after = at + 1
        return after if after < len(draft) and draft[after] == token_id else None
    return next((n for n in range(at + 1, len(draft)) if parents[n] == at and draft[n] == token_id), None)


def path_of(draft: Sequence[int], parents: Sequence[int], token_ids: Iterable[int]) -> tuple[int, ...]:
    """Which drafted tokens `token_ids` go along, as far as they do."""
    path: list[int] = []
    at = ROOT
    for token_id in token_ids:
        after = follow(draft, parents, at, token_id)
        if after is None:
            break
        path.append(after)
        at = after
    return tuple(path)


def depths(parents: Sequence[int]) -> list[int]:
    """How many drafted tokens stand before each on its path."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent == ROOT else found[parent] + 1)
    return found


def seen_bits(parents: Sequence[int], num_before: int) -> list[int]:
    """Which new tokens of the sequence each drafted one sees, as `kernels.paged_attention.tree` packs them: itself, its
    ancestors, and those `num_before` that stand before the draft.
    """
    found: list[int] = []
    for place, parent in enumerate(parents, num_before):
        found.append((1 << place) | ((1 << num_before) - 1 if parent == ROOT else found[parent]))
    return found


def first_children(parents: Sequence[int]) -> list[bool]:
    """Which tokens are the first that stand behind their parents."""
    first: dict[int, int] = {}
    return [first.setdefault(parent, n) == n for n, parent in enumerate(parents)]
