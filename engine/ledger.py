"""Which worker owns which block of a memory that several workers map: one 32-bit word for each block.

    bits 31..24   owner: number of a worker, from 1; 0 with the whole word 0: never given, it is at home
    bits 23..0    tag: 0, or the grant under which the present owner shall find the block's content

At home means: owner 1 has the first shares[0] blocks, owner 2 the next shares[1], and so on. A fresh ledger is all
zeros, so nobody has to fill it in.

A word is written by its block's present owner and by nobody else, and each write gives the block away. So two writers
never meet, and whoever dies between two writes, every block has exactly one owner: the words are all there is to know.

What this needs of the machine. A store of an aligned 32-bit word is one store: CPython packs the item of a memoryview
of format "I" with a copy of fixed size 4, which compilers make one instruction on x86-64 and AArch64. A block's bytes
must be visible before the word that gives it away: x86-64 keeps the order of stores; elsewhere taking and leaving a
lock twice does, for leaving releases and the second taking acquires. `tests/engine/test_ledger.py` looks at it from
two processes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..core.errors import InternalError
from ..core.ids import BlockId

MAX_OWNERS = 255
MAX_TAG = (1 << 24) - 1
_OWNER_SHIFT = 24
_WORD_BYTES = 4


class Entry(NamedTuple):
    """What the ledger says of one block."""

    owner: int
    tag: int


class Ledger:
    """The words in `words`, a writable view of 4 bytes a block, for owners 1, 2, … with these `shares` at home.

    Reading is safe from any thread; `give` belongs to the thread that owns the worker's pool.
    """

    def __init__(self, words: memoryview, shares: Sequence[int]) -> None:
        if not 0 < len(shares) <= MAX_OWNERS or words.nbytes != ledger_bytes(shares):
            raise InternalError(f"a ledger of {words.nbytes} bytes for shares {list(shares)}")
        self.shares, self.num_blocks = tuple(shares), sum(shares)
        self._words = words.cast("B").cast("I")
        self._home = np.repeat(np.arange(1, len(shares) + 1, dtype=np.uint32), shares)
        self._fence = threading.Lock()

    def share(self, owner: int) -> int:
        """Blocks of `owner` at home: what it has when nothing is under way."""
        return self.shares[owner - 1]

    def is_owner(self, number: int) -> bool:
        """`number` is a worker of this ledger."""
        return 1 <= number <= len(self.shares)

    def entry(self, block_id: int) -> Entry:
        """Raises IndexError for a block outside the memory."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} of {self.num_blocks}")
        word = self._words[block_id]
        return Entry(word >> _OWNER_SHIFT, word & MAX_TAG) if word else Entry(int(self._home[block_id]), 0)

    def blocks_of(self, owner: int) -> list[BlockId]:
        """Every block of `owner`, ascending."""
        return [BlockId(int(block_id)) for block_id in np.flatnonzero(self._owners() == owner)]

    def count(self, owner: int) -> int:
        """Number of blocks of `owner`."""
        return int(np.count_nonzero(self._owners() == owner))

    def counts(self) -> list[int]:
        """Blocks of each owner, owner 1 first."""
        found = np.bincount(self._owners(), minlength=len(self.shares) + 1)
        return [int(count) for count in found[1 : len(self.shares) + 1]]

    def give(self, block_ids: Sequence[BlockId], giver: int, taker: int, tag: int = 0) -> None:
        """From each store on the block is `taker`'s, and `giver` writes neither the block nor its word again.

        Raises InternalError, and gives nothing, when a block is not the giver's or the taker is no other worker.
        """
        if not self.is_owner(taker) or taker == giver or not 0 <= tag <= MAX_TAG:
            raise InternalError(f"worker {giver} gives blocks to worker {taker} of {len(self.shares)}, tag {tag}")
        foreign = [block_id for block_id in block_ids if self.entry(block_id).owner != giver]
        if foreign:
            raise InternalError(f"worker {giver} gives blocks {foreign}, which are not its own")
        for _ in range(2):
            with self._fence:
                pass
        for block_id in block_ids:
            self._store(block_id, taker << _OWNER_SHIFT | tag)

    def close(self) -> None:
        """Let go of the memory. Idempotent."""
        self._words.release()

    def _store(self, block_id: BlockId, word: int) -> None:
        self._words[block_id] = word

    def _owners(self) -> npt.NDArray[np.uint32]:
        words = np.frombuffer(self._words, np.uint32)
        return np.where(words == 0, self._home, words >> np.uint32(_OWNER_SHIFT))


def ledger_bytes(shares: Sequence[int]) -> int:
    """Size of a ledger for these shares."""
    return _WORD_BYTES * sum(shares)


def tag_of(generation: int) -> int:
    """The tag of a grant: never 0, and different for grants that live at the same time."""
    return 1 + generation % MAX_TAG
