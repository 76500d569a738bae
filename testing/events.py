"""Virtual time: a heap of things that will happen. Equal times happen in the order they were planned."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from .clock import FakeClock

Action = Callable[[], None]


class EventQueue:
    """Runs actions in order of virtual time on `clock`.

    `num_awaited` counts the planned ones that may still change something; timers that only look around are not.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self._heap: list[tuple[float, int, bool, Action]] = []
        self._order = count()
        self.num_run = 0
        self.num_awaited = 0

    def after(self, delay_s: float, action: Action, *, is_awaited: bool = True) -> None:
        self.num_awaited += is_awaited
        heapq.heappush(self._heap, (self.clock.now() + delay_s, next(self._order), is_awaited, action))

    def run_next(self) -> bool:
        """Run the next action; False when nothing is planned."""
        if not self._heap:
            return False
        moment, _, is_awaited, action = heapq.heappop(self._heap)
        self.num_awaited -= is_awaited
        self.clock.advance_to(moment)
        self.num_run += 1
        action()
        return True
