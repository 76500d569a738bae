"""One end of a measured link on which blocks change their owner: its part of the memory that both keep theirs in."""

from __future__ import annotations

import os

from ..core.ids import BlockId, Ticket
from ..engine.shared_files import inherited_fds
from ..engine.shared_pool import SharedPool
from .effects import Received, SendBlocks
from .identity import boot_id
from .ownership import Candidates, Ownership, first_pool
from .transports.owner import OwnerTransport

NUMBERS = {"bench-source": 1, "bench-destination": 2}


class OwnedBlocks:
    """`num_blocks` for each end at home; the files are the starting process's (`engine.shared_files`)."""

    def __init__(self, me: str, num_blocks: int, num_layers: int, layer_bytes: int, block_size: int) -> None:
        self._shared = SharedPool(inherited_fds(os.environ), NUMBERS[me], [num_blocks] * len(NUMBERS))
        self.memory = self._shared.attach(num_layers, layer_bytes)
        ledger, number = self._shared.ledger, NUMBERS[me]
        self._pool = first_pool(ledger, number, block_size)
        self._ownership = Ownership(ledger, self._pool, number, keep_prefix=False, number_of=NUMBERS.__getitem__)
        self.transport = OwnerTransport(self.memory, ledger, number, boot_id())
        self._tables: dict[Ticket, list[BlockId]] = {}

    def allocate(self, ticket: Ticket, num_blocks: int) -> list[BlockId]:
        if not self._tables:
            self._ownership.settle()  # what the run before has given back
        self._tables[ticket] = self._pool.allocate(num_blocks)
        return list(self._tables[ticket])

    def give(self, effect: SendBlocks) -> None:
        self._ownership.hand_over(Candidates(effect.block_ids, (), 0), effect.peer.worker_id, effect.generation)

    def take(self, effect: Received) -> None:
        """The source's blocks in place of our own; then all are free."""
        table = self._tables.pop(effect.ticket)
        self._ownership.take_over(table, effect.given, "bench-source", effect.done.generation)
        self._pool.free(table)

    def forget(self, ticket: Ticket) -> None:
        """All of it was given."""
        self._tables.pop(ticket, None)
