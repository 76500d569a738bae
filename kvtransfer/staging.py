"""Who uses which part of a worker's staging memory: a link takes its part once and gives it back when it ends."""

from __future__ import annotations

import threading

from ..engine.kv_memory import KVMemory
from .bulk import Span, Unusable

_ALIGN = 4096


class StagingArea:
    """First fit over the bytes behind the blocks of a `KVMemory`. Thread-safe."""

    def __init__(self, memory: KVMemory) -> None:
        self._first, self._stop = memory.nbytes, memory.nbytes + memory.staging_bytes
        self._taken: list[Span] = []  # in order of offset
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Span:
        """`nbytes` of the region; raises Unusable when there is no such gap."""
        needed = -(-nbytes // _ALIGN) * _ALIGN
        with self._lock:
            start = -(-self._first // _ALIGN) * _ALIGN
            for at, span in enumerate([*self._taken, Span(self._stop, 0)]):
                if span.offset - start >= needed:
                    self._taken.insert(at, Span(start, needed))
                    return Span(start, nbytes)
                start = span.offset + span.nbytes
        raise Unusable(f"no {nbytes} bytes of staging memory are left for this link; it has {self._stop - self._first}")

    def give_back(self, span: Span) -> None:
        """Idempotent."""
        with self._lock:
            self._taken = [taken for taken in self._taken if taken.offset != span.offset]
