"""Time is an argument: everything that waits takes a `Clock`, so tests and the simulation own it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds. Only durations and deadlines come from it, never a date."""

    def now(self) -> float: ...


class MonotonicClock:
    """The machine's monotonic clock; on Linux all processes of one host share its zero."""

    def now(self) -> float:
        return time.monotonic()
