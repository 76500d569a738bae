"""How long to wait before a worker that died is started again."""

from __future__ import annotations

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
HEALTHY_AFTER_S = 30.0


class Backoff:
    """Doubles from 0.2 s to 5 s with each exit; a life of 30 s or more starts over."""

    def __init__(self) -> None:
        self._delay_s = FIRST_DELAY_S

    def next_delay(self, lifetime_s: float) -> float:
        """Seconds to wait after a process that lived `lifetime_s`."""
        if lifetime_s >= HEALTHY_AFTER_S:
            self._delay_s = FIRST_DELAY_S
        delay, self._delay_s = self._delay_s, min(2 * self._delay_s, LONGEST_DELAY_S)
        return delay
