"""Whether the worker's loop turns. The loop writes, the threads that live beside it read: a hung step cannot hide."""

from __future__ import annotations

from ..core.clock import Clock

MAX_STEP_S = 60.0


class TurnWatch:
    """A loop whose turn lasts longer than `max_step_s` seconds is stalled, until it turns again. Any thread may ask."""

    def __init__(self, clock: Clock, max_step_s: float = MAX_STEP_S) -> None:
        self._clock, self._max_step_s = clock, max_step_s
        self._turned_at = clock.now()

    def turn(self) -> None:
        """The loop begins a turn."""
        self._turned_at = self._clock.now()

    def age_s(self) -> float:
        """Seconds since the loop began its last turn."""
        return max(0.0, self._clock.now() - self._turned_at)

    def is_stalled(self) -> bool:
        return self.age_s() > self._max_step_s
