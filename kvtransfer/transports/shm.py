"""Same host: decode maps the memory of prefill read-only and copies out of it. Push means "ready, copy now"."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np

from ...core.errors import ProtocolError, TransferFailed
from ...engine.kv_memory import KVMemory
from ..bulk import Bulk, Span
from .runs import paired

_GET_SEALS, _SHRINK = 1034, 2  # fcntl(2): F_GET_SEALS, F_SEAL_SHRINK
_COPY_BYTES = 4 << 20  # a revoked ticket waits for one copy of this size at most


class MappedPool:
    """Another worker's KV memory, read-only. Closing is idempotent and gives the memory of a dead peer back."""

    def __init__(self, fd: int, nbytes: int) -> None:
        """Map `fd` and close it; raises ProtocolError unless it is a memory of that size that can never shrink."""
        try:
            if nbytes == 0 or os.fstat(fd).st_size != nbytes or not _cannot_shrink(fd):
                raise ProtocolError(f"the descriptor received is not a sealed pool of {nbytes} bytes")
            self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.bytes = memoryview(self._map)

    def close(self) -> None:
        self.bytes.release()
        self._map.close()


class ShmBulk(Bulk):
    """Copies from the peer's memory into ours. `pool` is None at an end that never receives."""

    quarantine_s = 0.0
    is_reader = True

    def __init__(self, memory: KVMemory, pool: MappedPool | None) -> None:
        self._memory, self._pool, self._stopped = memory, pool, threading.Event()

    def send(self, spans: Sequence[Span]) -> None:
        """The peer reads by itself."""

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> None:
        if self._pool is None:
            raise ProtocolError("a push over shared memory from a peer that passed none")
        theirs, mine = self._pool.bytes, self._memory.region
        for start, stop, nbytes in paired(source, target, _COPY_BYTES):
            if self._stopped.is_set():
                raise TransferFailed("the link is over")
            if not wanted():
                return
            _copy(mine[stop : stop + nbytes], theirs[start : start + nbytes])

    def discard(self, source: Sequence[Span]) -> None:
        """Nothing has been sent."""

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def _copy(target: memoryview, source: memoryview) -> None:
    # numpy lets other threads run during a large copy; a memoryview assignment would stop the engine's thread.
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _cannot_shrink(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, _GET_SEALS) & _SHRINK)
    except OSError:
        return False
