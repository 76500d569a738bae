"""Drafts shaped as combs: a chain of likeliest tokens, and at each place of it the runners-up as leaves.

    a ─ b ─ c
    a'  b'  c'      A head that guesses has scored the runners-up anyway; where one of them is what the sequence draws,
    a"  b"          the step yields it and one token more.

A kind tells whether a token is of the chain or which runner-up, its place, and what probability the head gave it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..draft_tree import CHAIN, ROOT
from .interface import MAX_DRAFT_TOKENS, Draft

RUNNERS_UP = 2
SURENESS = 8  # kinds of a chain's place: in which eighth of [0, 1] a probability lies
HALVINGS = 5  # kinds of a leaf's place: how often 1 is halved to reach its probability; smaller ones are not drafted

_LEAVES = MAX_DRAFT_TOKENS * SURENESS  # the first kind of a leaf
NUM_KINDS = _LEAVES + RUNNERS_UP * MAX_DRAFT_TOKENS * HALVINGS

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def first_guess(kind: int) -> float:
    """How likely a token of this kind is right: the probability that it stands for."""
    if kind < _LEAVES:
        return (kind % SURENESS + 0.5) / SURENESS
    return float(0.75 * 0.5 ** ((kind - _LEAVES) % HALVINGS))


def chain_kind(place: int, share: float) -> int:
    return place * SURENESS + min(int(share * SURENESS), SURENESS - 1)


def leaf_kind(runner: int, place: int, share: float) -> int | None:
    """Of the runner-up with this number, from 1. None where it is too unlikely to be drafted."""
    halvings = int(-math.log2(share)) if share > 0 else HALVINGS
    if halvings >= HALVINGS:
        return None
    return _LEAVES + ((runner - 1) * MAX_DRAFT_TOKENS + place) * HALVINGS + halvings


def ranked(scores: Floats, best: int, count: int) -> list[int]:
    """`best`, whose score is the highest, and the `count` entries with the next ones. Changes nothing in the end."""
    found = [best]
    kept = [scores[best]]
    for _ in range(min(count, len(scores) - 1)):
        scores[found[-1]] = -np.inf
        found.append(int(scores.argmax()))
        kept.append(scores[found[-1]])
    scores[found] = kept
    return found


def shares_of(logits: Floats, entries: list[list[int]]) -> list[list[float]]:
    """The probabilities of some entries of each row."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: list[list[float]] = (np.take_along_axis(weights, np.array(entries), 1) / weights.sum(1)[:, None]).tolist()
    return shares


@dataclass(slots=True)
class Comb:
    """A draft while it grows, a place at a time."""

    token_ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    leaves: list[tuple[int, int, int]] = field(default_factory=list)  # place, token, kind

    def grow(self, token_ids: list[int], shares: list[float]) -> None:
        """The next place: the likeliest token, and its runners-up."""
        place = len(self.token_ids)
        self.token_ids.append(token_ids[0])
        self.kinds.append(chain_kind(place, shares[0]))
        for runner, (token_id, share) in enumerate(zip(token_ids[1:], shares[1:], strict=True), 1):
            kind = leaf_kind(runner, place, share)
            if kind is not None:
                self.leaves.append((place, token_id, kind))

    def draft(self, limit: int) -> Draft:
        """With `limit` places at most: the chain, whose tokens so lie in consecutive slots, then the leaves."""
        length = min(limit, len(self.token_ids))
        leaves = [leaf for leaf in self.leaves if leaf[0] < length]
        parents = (*range(ROOT, length - 1), *(place - 1 for place, _, _ in leaves)) if leaves else CHAIN
        return Draft(
            (*self.token_ids[:length], *(token_id for _, token_id, _ in leaves)),
            (*self.kinds[:length], *(kind for _, _, kind in leaves)),
            parents,
        )
