"""What a link reaches, measured once when it is made: a line in the log, and the ground for choosing a wire format."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..engine.kv_memory import KVMemory
from ..protocol.messages import KvHello
from .bulk import Bulk, Span, Unusable
from .staging import StagingArea

MEASURED_BYTES = 8 << 20
_SMALL_BYTES = 24 << 10
_SMALL_ROUNDS, _LARGE_ROUNDS = 5, 3

Ask = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """Gigabytes per second of a large piece, microseconds from asking to having a small one, a plain copy beside it."""

    gbps: float
    latency_us: float
    memcpy_gbps: float

    def __str__(self) -> str:
        if not self.gbps:
            return "not measured"
        return f"{self.gbps:.1f} GB/s, {self.latency_us:.0f} µs (memcpy {self.memcpy_gbps:.1f} GB/s)"


NO_FIGURES = LinkFigures(0.0, 0.0, 0.0)


def can_measure(mine: KvHello, theirs: KvHello) -> bool:
    """Both ends have staging memory to measure with."""
    return min(mine.staging_bytes, theirs.staging_bytes) >= 2 * MEASURED_BYTES


def measure(bulk: Bulk, staging: StagingArea, hello: KvHello, ask: Ask) -> LinkFigures:
    """The dialer's half: `ask` makes the peer send so many bytes from the start of its staging memory.

    Nothing is measured while other links use all of the staging memory here.
    """
    try:
        target = staging.take(MEASURED_BYTES)
    except Unusable:
        return NO_FIGURES
    try:
        small = min(_once(bulk, target, hello, ask, _SMALL_BYTES) for _ in range(_SMALL_ROUNDS))
        large = min(_once(bulk, target, hello, ask, MEASURED_BYTES) for _ in range(_LARGE_ROUNDS))
    finally:
        staging.give_back(target)
    return LinkFigures(MEASURED_BYTES / large / 1e9, small * 1e6, memcpy_gbps())


def answer_measure(bulk: Bulk, memory: KVMemory, nbytes: int) -> None:
    """The listener's half."""
    bulk.send([Span(memory.nbytes, nbytes)])


def memcpy_gbps(nbytes: int = MEASURED_BYTES, rounds: int = 3) -> float:
    """What one thread copies in this process now: the scale for a link on one host."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    return nbytes / min(_timed(lambda: np.copyto(target, source)) for _ in range(rounds)) / 1e9


def _once(bulk: Bulk, target: Span, hello: KvHello, ask: Ask, nbytes: int) -> float:
    source = [Span(hello.num_blocks * hello.block_bytes, nbytes)]

    def run() -> None:
        ask(nbytes)
        bulk.receive(source, [Span(target.offset, nbytes)], lambda: True)

    return _timed(run)


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return max(time.perf_counter() - started, 1e-9)
