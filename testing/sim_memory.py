"""One memory for the blocks of all simulated workers, and the promise that none of them is lost or owned twice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..engine.block_pool import BlockPool
from ..engine.kv_memory import KVMemory
from ..engine.ledger import Ledger, ledger_bytes
from ..kvtransfer.ownership import Ownership, check_conservation, first_pool
from .fake_engine import NUM_LAYERS, SLOT_BYTES
from .invariants import InvariantBroken, guarded


@dataclass(frozen=True, slots=True)
class MemoryShare:
    """What one incarnation of a worker gets: the pool of all that is its own now, and its side of all exchanges."""

    ledger: Ledger
    number: int
    pool: BlockPool
    ownership: Ownership


class SimMemory:
    """The workers called `names` have `num_blocks` blocks each at home. Outlives every incarnation, as memory files do.

    `keep_prefix`: see `Ownership`.
    """

    def __init__(self, names: Iterable[str], num_blocks: int, block_size: int, keep_prefix: bool) -> None:
        self._numbers = {name: number for number, name in enumerate(names, 1)}
        shares = [num_blocks] * len(self._numbers)
        self._block_size, self._keep_prefix = block_size, keep_prefix
        self.ledger = Ledger(memoryview(bytearray(ledger_bytes(shares))), shares)
        self.blocks = KVMemory(sum(shares), NUM_LAYERS, block_size * SLOT_BYTES)
        self._living: dict[int, BlockPool] = {}

    def join(self, worker_id: str) -> MemoryShare:
        """A new incarnation."""
        number = self._numbers[worker_id]
        pool = self._living[number] = first_pool(self.ledger, number, self._block_size)
        ownership = Ownership(
            self.ledger, pool, number, keep_prefix=self._keep_prefix, number_of=self._numbers.__getitem__
        )
        return MemoryShare(self.ledger, number, pool, ownership)

    def leave(self, worker_id: str) -> None:
        """The incarnation is gone; what it owned waits for the next."""
        self._living.pop(self._numbers[worker_id], None)

    def check(self) -> None:
        """I4 across workers: every block has one owner, and is in no pool but that owner's."""
        with guarded("I4", "memory", "blocks of all workers"):
            check_conservation(self.ledger, self._living)

    def check_gift(self, owner: int, block_id: int) -> None:
        """I5: what is found in place of a copy is the finder's, and nobody else can write it."""
        holders = [number for number, pool in self._living.items() if block_id in pool.block_ids()]
        if holders or self.ledger.entry(block_id).owner != owner:
            raise InvariantBroken(f"I5 memory: block {block_id}, given to worker {owner}, is in the pools of {holders}")

    def check_at_rest(self) -> None:
        """I8: nobody lives above or below its share, and everyone knows all that is its own."""
        with guarded("I8", "memory", "blocks of all workers at rest"):
            check_conservation(self.ledger, self._living, at_rest=True)
        if tuple(self.ledger.counts()) != self.ledger.shares:
            raise InvariantBroken(f"I8 memory: at rest owners have {self.ledger.counts()} of {self.ledger.shares}")
