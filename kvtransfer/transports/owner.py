"""Both workers map one memory: blocks that were given stay where they are, all others are copied within it.

A given block has the same span on both sides, and its owner in the ledger is checked in place of a copy. The words are
written by the workers' loops (`kvtransfer.ownership`); the threads of a link only read them.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Sequence

import numpy as np

from ...core.errors import ProtocolError, TransferFailed
from ...core.ids import WorkerKey
from ...engine.kv_memory import KVMemory
from ...engine.ledger import Ledger
from ..bulk import Bulk, LinkFacts, NotTheirs, Span, Transport, Unusable
from ..ownership import TRANSPORT, is_given
from .runs import paired

NAME = TRANSPORT
_COPY_BYTES = 4 << 20  # a revoked ticket waits for one copy of this size at most
_OFFER = struct.Struct("<QQII")  # device and inode of the memory file, owner number, length of the host's id


class OwnerBulk(Bulk):
    """One link between owners `me` and `peer` of one memory. `refused` counts spans whose blocks are not as said."""

    quarantine_s = 0.0
    in_parts = True

    def __init__(self, memory: KVMemory, ledger: Ledger, me: int, peer: int) -> None:
        self._memory, self._ledger, self._me, self.peer = memory, ledger, me, peer
        self._stopped = threading.Event()
        self.refused = 0
        self.copied_bytes = 0

    def send(self, spans: Sequence[Span]) -> None:
        """Everything is where the peer looks for it."""

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> None:
        """Raises ProtocolError for a span outside the memory, NotTheirs for a block that has another owner than said.

        The latter is no breach: a source that has withdrawn this push may have given its blocks to others meanwhile.
        """
        region = self._memory.region
        for start, stop, nbytes in paired(source, target, _COPY_BYTES):
            if self._stopped.is_set():
                raise TransferFailed("the link is over")
            if not wanted():
                return
            self._check(start, nbytes, self._me if start == stop else self.peer)
            if start != stop:
                self._check(stop, nbytes, self._me)
                # numpy lets other threads run during a large copy; see shm.
                np.copyto(np.frombuffer(region, np.uint8, nbytes, stop), np.frombuffer(region, np.uint8, nbytes, start))
                self.copied_bytes += nbytes

    def is_given(self, block_id: int, generation: int) -> bool:
        """The block was given to this worker under its grant; raises ProtocolError for one outside the memory."""
        return is_given(self._ledger, block_id, self._me, generation)

    def discard(self, source: Sequence[Span]) -> None:
        """Nothing has been sent."""

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        """The memory is the worker's."""

    def _check(self, offset: int, nbytes: int, owner: int) -> None:
        """Every block that these bytes touch is `owner`'s."""
        size = self._memory.block_bytes
        if offset < 0 or offset + nbytes > self._memory.nbytes:
            self.refused += 1
            raise ProtocolError(f"bytes [{offset}, {offset + nbytes}) of a memory of {self._memory.nbytes}")
        for block_id in range(offset // size, -(-(offset + nbytes) // size)):
            found = self._ledger.entry(block_id).owner
            if found != owner:
                self.refused += 1
                raise NotTheirs(f"block {block_id} is worker {found}'s, it must be worker {owner}'s")


class OwnerTransport(Transport):
    """For worker number `me` of `ledger`. `host_id`: names this boot of this machine, where inodes have meaning."""

    name = NAME

    def __init__(self, memory: KVMemory, ledger: Ledger, me: int, host_id: str) -> None:
        self._memory, self._ledger, self._me, self._host_id = memory, ledger, me, host_id.encode()

    def offer(self) -> bytes:
        """Which memory file this worker maps, and its number there. Raises Unusable where memory has no file."""
        fd = self._memory.fileno()
        if fd is None or not self._host_id:
            raise Unusable("owner: the memory is no file of this host that another worker could map")
        info = os.fstat(fd)
        return _OFFER.pack(info.st_dev, info.st_ino, self._me, len(self._host_id)) + self._host_id

    def connect(self, facts: LinkFacts, peer_offer: bytes) -> Bulk:
        """Raises Unusable unless the peer maps the same memory as another owner."""
        return OwnerBulk(self._memory, self._ledger, self._me, self.peer_number(facts.peer, peer_offer))

    def peer_number(self, key: WorkerKey, peer_offer: bytes) -> int:
        """Which owner of the same memory the peer is; raises Unusable when it is none."""
        mine = self.offer()
        if len(peer_offer) != len(mine):
            raise Unusable(f"owner: an offer of {len(peer_offer)} bytes; one of this host has {len(mine)}")
        device, inode, peer, length = _OFFER.unpack_from(peer_offer)
        if _OFFER.pack(device, inode, self._me, length) + peer_offer[_OFFER.size :] != mine:
            raise Unusable(f"owner: {key} maps another memory; only workers of one cluster share one")
        if peer == self._me or not self._ledger.is_owner(peer):
            raise Unusable(f"owner: {key} calls itself worker {peer}, this is {self._me}")
        return int(peer)

    def close(self) -> None:
        """Nothing is registered."""
