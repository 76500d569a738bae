"""A clock that stands still until it is told to move."""

from __future__ import annotations


class FakeClock:
    """Virtual seconds. `advance` is the only thing that makes time pass."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"time cannot go back by {-seconds} s")
        self._now += seconds

    def advance_to(self, moment: float) -> None:
        self.advance(max(0.0, moment - self._now))
