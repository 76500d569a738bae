"""Token counts drawn from a range."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

MAX_LENGTH = 1 << 22


@dataclass(frozen=True, slots=True)
class Lengths:
    """Whole numbers from `low` to `high`, each as likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """`512` or `128-1024`; raises ValueError that says what is expected."""
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
        if found is None:
            raise ValueError(f"must be a number of tokens or a range such as 128-1024, got {text!r}")
        low, high = int(found[1]), int(found[2] or found[1])
        if not 1 <= low <= high <= MAX_LENGTH:
            raise ValueError(f"must be from 1 to {MAX_LENGTH}, the smaller number first, got {text!r}")
        return cls(low, high)

    def draw(self, random: np.random.Generator, count: int) -> list[int]:
        return [int(n) for n in random.integers(self.low, self.high + 1, count)]
