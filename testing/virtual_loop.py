"""An asyncio loop on virtual time: when nothing is ready, time jumps to the next timer.

Client and server of a test run in one such loop, over a Unix socket or loopback: what one end has written is in the
other's buffer when the write returns, so a look that finds nothing ready means that nobody has anything to do. Hours of
traffic pass in seconds, and every moment is exact: a timer set for 0.25 s fires at 0.25 s on any machine, however slow.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):  # type: ignore[misc, valid-type, unused-ignore]
    """A selector that does not wait: it adds what it was to wait for to `passed_s`."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:  # no timer: only another thread can have news
            return super().select(None)
        self.passed_s += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Begins at 0. `now` makes it a Clock."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)
        # Timers due within the resolution of the real clock would fire early; here moments are exact.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._jumping.passed_s

    def now(self) -> float:
        return self._jumping.passed_s


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on virtual time; `asyncio.get_running_loop()` is the VirtualLoop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
