"""A wall clock that can be stepped, and that remembers which modules of the product read it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

PRODUCT, OUTSIDE = "penstock.", "penstock.testing."


class SteppedWallClock:
    """Replaces `time.time` and `time.time_ns` from `step` until `close`; the monotonic clock goes on as it is."""

    def __init__(self) -> None:
        self.readers: set[str] = set()
        self._time, self._time_ns = time.time, time.time_ns
        self._offset_s = 0.0
        self._undo = ExitStack()

    def step(self, seconds: float) -> None:
        self.close()
        self._offset_s += seconds
        self._undo.enter_context(patch.object(time, "time", self._read))
        self._undo.enter_context(patch.object(time, "time_ns", self._read_ns))

    def offset_s(self) -> float:
        """How far the wall clock that everybody reads is from the true one."""
        return time.time() - self._time()

    def close(self) -> None:
        """The true clock again. Safe twice."""
        self._undo.close()

    def _read(self) -> float:
        self._note(sys._getframe(1).f_globals.get)
        return self._time() + self._offset_s

    def _read_ns(self) -> int:
        self._note(sys._getframe(1).f_globals.get)
        return self._time_ns() + int(self._offset_s * 1e9)

    def _note(self, get: Callable[[str], object]) -> None:
        name = str(get("__name__"))
        if name.startswith(PRODUCT) and not name.startswith(OUTSIDE):
            self.readers.add(name)
