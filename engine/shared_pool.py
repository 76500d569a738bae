"""One memory for the KV blocks of all workers of a host, as one of the workers sees it.

SharedPool   takes a number, sizes and seals the files (`engine.shared_files`) if it is the first, maps the ledger
attach       maps the blocks
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Sequence

from ..core.errors import ConfigError
from .kv_memory import KVMemory, fix_size
from .ledger import MAX_OWNERS, Ledger, ledger_bytes

_OFD_SETLK = 37  # fcntl(2): F_OFD_SETLK
_FLOCK = struct.Struct("hhqqi4x")


class SharedPool:
    """Worker `number` of those whose pools have `shares` blocks, in order from number 1, at home in one memory.

    Holds the number as long as it lives, and its process: two incarnations that both write as one owner would corrupt
    the ledger. `close` gives back number and ledger; the memory is the engine's to close.
    """

    def __init__(self, fds: tuple[int, int], number: int, shares: Sequence[int]) -> None:
        """Raises ConfigError when the number is in use, or the ledger was made for other shares."""
        if not 1 <= number <= len(shares) <= MAX_OWNERS:
            raise ConfigError(f"transfer.one_pool: worker number {number} of {len(shares)}; at most {MAX_OWNERS} fit")
        self.number, self.shares = number, tuple(shares)
        self._blocks_fd, ledger_fd = fds
        self._fd = os.open(f"/proc/self/fd/{ledger_fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            _take_number(self._fd, number)
            fix_size(self._fd, ledger_bytes(shares), "the ledger of the shared pool")
            self._map = mmap.mmap(self._fd, ledger_bytes(shares))
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map)
        self.ledger = Ledger(self._view, shares)

    def attach(self, num_layers: int, layer_bytes: int) -> KVMemory:
        """All blocks of all workers; raises ConfigError when the file was made for blocks of another size."""
        return KVMemory.attach(self._blocks_fd, sum(self.shares), num_layers, layer_bytes)

    def close(self) -> None:
        """Idempotent."""
        self.ledger.close()
        self._view.release()
        self._map.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _take_number(fd: int, number: int) -> None:
    """Lock byte `number` of the file behind `fd`, until it is closed. `fd` must be a description of its own."""
    try:
        fcntl.fcntl(fd, _OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))
    except BlockingIOError as err:
        raise ConfigError(
            f"transfer.one_pool: another process already is worker number {number} of the shared pool; end it first"
        ) from err
