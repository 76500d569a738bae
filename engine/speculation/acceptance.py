"""How likely a drafted token is right: counted for each kind that its proposer tells apart, corrected by sequence.

A proposer says what it knows of a token (its kind); whether that means one in ten or nine in ten is learned from what
becomes of them. A sequence that does better or worse than others has a correction in log-odds, which learns as logistic
regression does, a step for each token. Where several are drafted for one place, the first is what the proposer holds
likeliest; the others are right where it is wrong, and have a correction of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .interface import Proposer

_PRIOR_WEIGHT = 2.0  # tokens that the proposer's own guess counts for
_MEMORY = 256.0  # tokens of a kind after which older ones count for less
_RATE, _FARTHEST = 0.3, 4.0  # of a sequence's correction
_FIRST_MEAN, _MEAN_RATE = 0.6, 0.06


@dataclass(slots=True)
class Correction:
    """In log-odds."""

    shift: float = 0.0


@dataclass(slots=True)
class Corrections:
    """Of one sequence: for first children and for others."""

    first: Correction = field(default_factory=Correction)
    other: Correction = field(default_factory=Correction)

    def of(self, is_first: bool) -> Correction:
        return self.first if is_first else self.other


class Acceptance:
    """Of one proposer's tokens."""

    def __init__(self, proposer: Proposer) -> None:
        self.mean = _FIRST_MEAN  # of first children of all kinds, lately
        kinds = range(proposer.num_kinds)
        self._tried = [_PRIOR_WEIGHT] * len(kinds)
        self._right = [_PRIOR_WEIGHT * min(max(proposer.first_guess(kind), 0.05), 0.95) for kind in kinds]

    def chance(self, kind: int, correction: Correction) -> float:
        """That a token of this kind is what its sequence draws, when all it follows are; within (0, 1)."""
        rate = min(max(self._right[kind] / self._tried[kind], 0.002), 0.998)
        return 1 / (1 + (1 - rate) / rate * math.exp(-correction.shift))

    def note(self, kind: int, corrections: Corrections, *, is_right: bool, is_first: bool = True) -> None:
        if is_first:
            self.mean += _MEAN_RATE * (is_right - self.mean)
        correction = corrections.of(is_first)
        surprise = is_right - self.chance(kind, correction)
        correction.shift = min(max(correction.shift + _RATE * surprise, -_FARTHEST), _FARTHEST)
        if self._tried[kind] > _MEMORY:
            self._tried[kind] /= 2
            self._right[kind] /= 2
        self._tried[kind] += 1
        self._right[kind] += is_right
