"""How many threads a step computes with: this worker's share of the machine, decided when the step begins.

Prefill and decode workers of one machine share its cores. Two teams of threads that both want all cores wait for each
other's descheduled members and lose most of the machine, so a worker takes the cores divided by the number of workers
that compute just now: all of them when it is alone, its part when it is not. Steps of a few tokens take half of that:
they are bound by memory, which fewer cores saturate, and made of so many short operators that one descheduled thread
holds up all others; the cores left over serve the router, the gateway and whatever else the machine does.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path

from ..core.clock import Clock
from ..protocol.messages import SampledToken
from .interface import Engine, OnLayers, ScheduledSeq

MAX_WORKERS = 256
GRACE_S = 0.03  # a worker counts as computing for so long after a step: the next one usually follows at once
STEP_S = 5.0  # and for so long into a step, so that a worker killed in one is forgotten
MANY_TOKENS = 16  # from here on a second thread pays even in a decode step
MANY_TOKENS_NATIVE = 2  # the same for the native step, which is one operator and not some two hundred
_CELL = struct.Struct("<d")


class CoreShare:
    """One worker's view of who computes. The workers of a machine map one small file; each writes its own cell only.

    A cell holds the time until which its worker counts as computing, on the monotonic clock that all processes share.
    """

    def __init__(self, path: Path, slot: int, max_threads: int, clock: Clock) -> None:
        """`slot`: this worker's number, below MAX_WORKERS. `max_threads`: threads when nobody else computes."""
        if not 0 <= slot < MAX_WORKERS:
            raise ValueError(f"slot {slot}: from 0 to {MAX_WORKERS - 1} are possible")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, MAX_WORKERS * _CELL.size)
            self._cells = mmap.mmap(fd, MAX_WORKERS * _CELL.size)
        finally:
            os.close(fd)
        self._slot, self._max_threads, self._clock = slot, max_threads, clock
        self._mark(0.0)

    def num_threads(self) -> int:
        """Threads for a step that begins now; at least one."""
        now = self._clock.now()
        cells = struct.iter_unpack(_CELL.format, self._cells)
        others = len([slot for slot, (until,) in enumerate(cells) if slot != self._slot and until > now])
        return max(1, self._max_threads // (1 + others))

    def begin(self, within_s: float = STEP_S) -> int:
        """A step begins, or something else that computes and ends `within_s`: the others see it. Returns its number of
        threads.
        """
        self._mark(self._clock.now() + within_s)
        return self.num_threads()

    def end(self) -> None:
        """The step is over; the next one is expected at once."""
        self._mark(self._clock.now() + GRACE_S)

    def rest(self) -> None:
        """No step follows for now."""
        self._mark(0.0)

    def close(self) -> None:
        self.rest()
        self._cells.close()

    def _mark(self, until: float) -> None:
        _CELL.pack_into(self._cells, self._slot * _CELL.size, until)


class SharingEngine:
    """`inner`, whose steps take this worker's share of the cores. Implements `engine.interface.Engine`."""

    def __init__(
        self,
        engine: Engine,
        share: CoreShare,
        set_num_threads: Callable[[int], None],
        many_tokens: int = MANY_TOKENS,
    ) -> None:
        self.spec, self.memory = engine.spec, engine.memory
        self.inner, self._share, self._set_num_threads = engine, share, [set_num_threads]
        self._num_threads, self._many_tokens = 0, many_tokens

    def add_engine(self, set_num_threads: Callable[[int], None]) -> None:
        """An engine that computes between the steps of this one uses as many threads."""
        self._set_num_threads.append(set_num_threads)

    def execute(self, batch: list[ScheduledSeq], on_layers: OnLayers | None = None) -> list[tuple[SampledToken, ...]]:
        """See `Engine.execute`."""
        num_threads = self._share.begin()
        if sum(entry.num_step_tokens for entry in batch) < self._many_tokens:
            num_threads = max(1, num_threads // 2)
        if num_threads != self._num_threads:
            for set_num_threads in self._set_num_threads:
                set_num_threads(num_threads)
            self._num_threads = num_threads
        try:
            return self.inner.execute(batch, on_layers)
        finally:
            self._share.end()

    def rest(self) -> None:
        self._share.rest()
