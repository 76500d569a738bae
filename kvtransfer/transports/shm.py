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
from ...kernels.digest.op import copied, copies_natively
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

    def __init__(self, memory: KVMemory, pool: MappedPool | None, digests: bool = True) -> None:
        self._memory, self._pool, self._stopped = memory, pool, threading.Event()
        # Without the native kernel a copy and a digest are two passes: then each part is digested while it is warm.
        self._digests = digests and copies_natively()
        self.in_parts = not self._digests

    def send(self, spans: Sequence[Span]) -> None:
        """The peer reads by itself."""

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> bytes | None:
        if self._pool is None:
            raise ProtocolError("a push over shared memory from a peer that passed none")
        if self._digests and _are_blocks(source, target):
            return self._receive_digested(self._pool, source, target, wanted)
        theirs, mine = self._pool.bytes, self._memory.region
        for start, stop, nbytes in paired(source, target, _COPY_BYTES):
            if not self._goes_on(wanted):
                return None
            _copy(mine[stop : stop + nbytes], theirs[start : start + nbytes])
        return None

    def _receive_digested(
        self, pool: MappedPool, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]
    ) -> bytes | None:
        """Block by block: a copy waits for memory, and the digest of what passes by comes with it."""
        each = max(1, _COPY_BYTES // max(span.nbytes for span in target))
        found = b""
        for start in range(0, len(source), each):
            if not self._goes_on(wanted):
                return None
            part = slice(start, start + each)
            found += copied(pool.bytes, source[part], self._memory.region, target[part])
        return found

    def _goes_on(self, wanted: Callable[[], bool]) -> bool:
        if self._stopped.is_set():
            raise TransferFailed("the link is over")
        return wanted()

    def discard(self, source: Sequence[Span]) -> None:
        """Nothing has been sent."""

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def _are_blocks(source: Sequence[Span], target: Sequence[Span]) -> bool:
    """Both sides name the same blocks, none of which is more than one copy."""
    sizes = [span.nbytes for span in source]
    return sizes == [span.nbytes for span in target] and max(sizes, default=0) <= _COPY_BYTES


def _copy(target: memoryview, source: memoryview) -> None:
    # numpy lets other threads run during a large copy; a memoryview assignment would stop the engine's thread.
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _cannot_shrink(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, _GET_SEALS) & _SHRINK)
    except OSError:
        return False
