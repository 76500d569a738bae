"""The bytes behind the block pool: one flat region, block-major, that another process can map.

    block b, layer l:   buffer[(b · num_layers + l) · layer_bytes :][: layer_bytes]
    holds               [2 (K, V), block_size, num_kv_heads, head_dim]

All layers of a block lie side by side, so a block is one copy and one digest, and a range of layers of it is
contiguous too. On Linux the region is a sealed memfd: it has no name, dies with its last user, and a reader can never
be hit by a shrink. Workers of one host may share one that their supervisor keeps (`engine.shared_pool`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import weakref

from ..core.errors import ConfigError

_ADD_SEALS, _GET_SEALS, _SEAL, _SHRINK, _GROW = 1033, 1034, 1, 2, 4  # fcntl(2): F_ADD_SEALS, F_GET_SEALS, F_SEAL_*
_FIXED = _SHRINK | _GROW | _SEAL
DEFAULT_KV_BYTES = 1 << 30  # touched only as it fills


class KVMemory:
    """`num_blocks` blocks of `num_layers` · `layer_bytes`, and `staging_bytes` behind them for what is converted on its
    way to another worker.

    `buffer` is a writable view of the blocks, `region` of everything: what a transport registers. Untouched parts take
    no memory. Closing is idempotent.
    """

    device: int | None = None  # number of the CUDA device that holds the region; None: host memory

    def __init__(self, num_blocks: int, num_layers: int, layer_bytes: int, staging_bytes: int = 0) -> None:
        nbytes = num_blocks * num_layers * layer_bytes + staging_bytes
        self._map_blocks(_sealed_memfd(nbytes), num_blocks, num_layers, layer_bytes, staging_bytes)

    @classmethod
    def attach(cls, fd: int, num_blocks: int, num_layers: int, layer_bytes: int) -> KVMemory:
        """The blocks in the memory file `fd`, which stays the caller's and outlives `close`. There is no staging.

        Whoever attaches first gives the file its size, for good. Raises ConfigError when it has another.
        """
        fix_size(fd, num_blocks * num_layers * layer_bytes, "the shared pool")
        memory = cls.__new__(cls)
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        memory._map_blocks(own, num_blocks, num_layers, layer_bytes, 0)
        return memory

    def _map_blocks(
        self, fd: int | None, num_blocks: int, num_layers: int, layer_bytes: int, staging_bytes: int
    ) -> None:
        self.num_blocks, self.num_layers, self.layer_bytes = num_blocks, num_layers, layer_bytes
        self.block_bytes = num_layers * layer_bytes
        self.nbytes = num_blocks * self.block_bytes
        self.staging_bytes = staging_bytes
        self._fd = fd
        self._release_fd = weakref.finalize(self, _close, fd)  # also where nobody closes it
        self._map = mmap.mmap(-1 if fd is None else fd, self.nbytes + staging_bytes)
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
        self._fd = None
        self._release_fd()
        self.buffer.release()
        self.region.release()
        try:
            self._map.close()
        except BufferError:
            return


def blocks_in(kv_bytes: int, block_bytes: int) -> int:
    """How many blocks fit; raises ConfigError when that is fewer than two."""
    if kv_bytes < 2 * block_bytes:
        raise ConfigError(f"kv_cache_bytes: {kv_bytes} holds fewer than two blocks of {block_bytes} bytes; raise it")
    return kv_bytes // block_bytes


def open_memfd(name: str) -> int:
    """An empty memory file; close-on-exec. Raises ConfigError on a system that has none."""
    if not hasattr(os, "memfd_create"):
        raise ConfigError("transfer.one_pool: this system has no memory files (Linux has); leave it off")
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def fix_size(fd: int, nbytes: int, what: str) -> None:
    """Give an empty memory file `nbytes` that can never change; raises ConfigError when it has another size.

    Several processes may do so at the same time, with the same size: each of the two steps is the same for all.
    """
    if not fcntl.fcntl(fd, _GET_SEALS) & _SEAL and os.fstat(fd).st_size in (0, nbytes):
        with contextlib.suppress(PermissionError):  # another process was faster
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, _ADD_SEALS, _FIXED)
    found = os.fstat(fd).st_size
    if found != nbytes or fcntl.fcntl(fd, _GET_SEALS) & _FIXED != _FIXED:
        raise ConfigError(f"{what} has {found} bytes, this worker needs {nbytes}; restart the whole cluster")


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _sealed_memfd(nbytes: int) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None
    fd = open_memfd("penstock-kv")
    try:
        fix_size(fd, nbytes, "a new pool")
    except (OSError, ConfigError):
        os.close(fd)
        raise
    return fd
