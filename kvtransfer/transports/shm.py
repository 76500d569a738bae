"""Same host: decode maps the pool of prefill read-only and copies out of it. Push means "ready, copy now"."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np

from ...core.errors import ProtocolError
from ...engine.kv_memory import KVMemory
from ...protocol.messages import Push
from ..acceptance import Acceptances
from .runs import run_length, run_view, runs

_GET_SEALS, _SHRINK = 1034, 2  # fcntl(2): F_GET_SEALS, F_SEAL_SHRINK
_COPY_BYTES = 4 << 20  # a revoked ticket waits for one copy of this size at most


class MappedPool:
    """Another worker's pool, read-only. Closing is idempotent and gives the memory of a dead peer back."""

    def __init__(self, fd: int, num_blocks: int, block_bytes: int) -> None:
        """Map `fd` and close it; raises ProtocolError unless it is a pool of that size that can never shrink."""
        try:
            nbytes = num_blocks * block_bytes
            if nbytes == 0 or os.fstat(fd).st_size != nbytes or not _cannot_shrink(fd):
                raise ProtocolError(
                    f"the descriptor received is not a sealed pool of {num_blocks} x {block_bytes} bytes"
                )
            self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self._bytes = memoryview(self._map)

    def view(self, first_block: int, length: int, offset: int = 0, nbytes: int | None = None) -> memoryview:
        """`length` adjacent blocks, or `nbytes` at `offset` within the first."""
        start = first_block * self.block_bytes + offset
        return self._bytes[start : start + (length * self.block_bytes if nbytes is None else nbytes)]

    def close(self) -> None:
        self._bytes.release()
        self._map.close()


def pull(pool: MappedPool, memory: KVMemory, push: Push, blocks: Sequence[int], acceptances: Acceptances) -> None:
    """Copy the pushed blocks into `blocks`; stops when the ticket is revoked. The slots of `push` have been checked."""
    offset, nbytes = push.first_layer * memory.layer_bytes, push.num_layers * memory.layer_bytes
    for start, length in runs(push.source_slots, blocks, max_length=run_length(push, memory, _COPY_BYTES)):
        if acceptances.is_revoked(push):
            return
        source = pool.view(push.source_slots[start], length, offset, nbytes if length == 1 else None)
        _copy(run_view(memory, push, blocks[start], length), source)


def _copy(target: memoryview, source: memoryview) -> None:
    # numpy lets other threads run during a large copy; a memoryview assignment would stop the engine's thread.
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _cannot_shrink(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, _GET_SEALS) & _SHRINK)
    except OSError:
        return False
