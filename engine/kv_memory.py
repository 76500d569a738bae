"""The bytes behind the block pool: one flat region, block-major, that another process can map.

    block b, layer l:   buffer[(b · num_layers + l) · layer_bytes :][: layer_bytes]
    holds               [2 (K, V), block_size, num_kv_heads, head_dim]

All layers of a block lie side by side, so a block is one copy and one digest, and a range of layers of it is
contiguous too. On Linux the region is a sealed memfd: it has no name, dies with its last user, and a reader can never
be hit by a shrink.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

_ADD_SEALS, _SEAL, _SHRINK, _GROW = 1033, 1, 2, 4  # fcntl(2): F_ADD_SEALS, F_SEAL_*


class KVMemory:
    """`num_blocks` blocks of `num_layers` · `layer_bytes`, and `staging_bytes` behind them for what is converted on its
    way to another worker.

    `buffer` is a writable view of the blocks, `region` of everything: what a transport registers. Untouched parts take
    no memory. Closing is idempotent.
    """

    device: int | None = None  # number of the CUDA device that holds the region; None: host memory

    def __init__(self, num_blocks: int, num_layers: int, layer_bytes: int, staging_bytes: int = 0) -> None:
        self.num_blocks, self.num_layers, self.layer_bytes = num_blocks, num_layers, layer_bytes
        self.block_bytes = num_layers * layer_bytes
        self.nbytes = num_blocks * self.block_bytes
        self.staging_bytes = staging_bytes
        self._fd = _sealed_memfd(self.nbytes + staging_bytes)
        self._map = mmap.mmap(-1 if self._fd is None else self._fd, self.nbytes + staging_bytes)
        self.region = memoryview(self._map)
        self.buffer = self.region[: self.nbytes]

    @property
    def address(self) -> int:
        """Where the region begins in this process; for libraries that register memory by address."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def fileno(self) -> int | None:
        """The memfd, to be sent over a Unix socket; None where the system has none."""
        return self._fd

    def block(self, block_id: int, first_layer: int = 0, num_layers: int | None = None) -> memoryview:
        """Bytes of `num_layers` layers of one block, from `first_layer` on (all by default)."""
        count = self.num_layers - first_layer if num_layers is None else num_layers
        if not (0 <= block_id < self.num_blocks and first_layer >= 0 and 0 < count <= self.num_layers - first_layer):
            layers = f"layers [{first_layer}, {first_layer + count})"
            raise IndexError(f"block {block_id} {layers} of {self.num_blocks} x {self.num_layers}")
        start = block_id * self.block_bytes + first_layer * self.layer_bytes
        return self.buffer[start : start + count * self.layer_bytes]

    def close(self) -> None:
        """Give the region back. A view that still lives (a torch tensor) keeps the mapping until it goes."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
        self.buffer.release()
        self.region.release()
        try:
            self._map.close()
        except BufferError:
            return


def _sealed_memfd(nbytes: int) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None
    fd = os.memfd_create("penstock-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, _ADD_SEALS, _SHRINK | _GROW | _SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd
