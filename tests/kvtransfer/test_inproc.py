"""The network of the simulation: deterministic, one deliverable at a time."""

from __future__ import annotations

import pytest

from penstock.core.ids import BlockId, Ticket, WorkerKey
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.effects import (
    AcceptBlocks,
    BlocksArrived,
    LinkEvent,
    MessageArrived,
    PeerLost,
    PeerUp,
    Revoke,
    Revoked,
    SendBlocks,
    SendMessage,
)
from penstock.kvtransfer.transports.inproc import InprocMesh, InprocNetwork
from penstock.protocol.messages import Fingerprint, Offer, Peer, Role

FINGERPRINT = Fingerprint(
    model="m", weights="w", dtype="f4", num_layers=2, num_kv_heads=1, head_dim=1, block_size=4, layout="l"
)
TICKET = Ticket(b"t" * 16)
OFFER = Offer(ticket=TICKET, num_tokens=1, num_blocks=1)


class Pair:
    def __init__(self) -> None:
        self.network = InprocNetwork()
        self.events: dict[str, list[LinkEvent]] = {"prefill": [], "decode": []}
        self.prefill, self.decode = self._mesh("prefill"), self._mesh("decode")
        self.peers = [
            Peer(worker_id=mesh.key.worker_id, epoch=mesh.key.epoch, role=mesh.role, kv_address=mesh.address)
            for mesh in (self.prefill, self.decode)
        ]

    def _mesh(self, role: Role) -> InprocMesh:
        key = WorkerKey(role, "0" * 16)
        return InprocMesh(key, role, FINGERPRINT, KVMemory(4, 2, 8), self.events[role].append, self.network)

    def link(self) -> None:
        self.prefill.set_peers(self.peers)
        self.decode.set_peers(self.peers)
        self.network.deliver_all()
        assert self.take("decode") == [PeerUp(self.prefill.key, "inproc")]
        assert self.take("prefill") == [PeerUp(self.decode.key, "inproc")]

    def take(self, role: str) -> list[LinkEvent]:
        taken, self.events[role][:] = list(self.events[role]), []
        return taken


@pytest.fixture
def pair() -> Pair:
    pair = Pair()
    pair.link()
    return pair


def test_messages_and_pushes_are_delivered_one_by_one_in_order(pair: Pair) -> None:
    pair.prefill.memory.block(3)[:] = b"k" * 16
    pair.decode.perform(AcceptBlocks(pair.prefill.key, TICKET, 1, {0: BlockId(2)}))
    pair.prefill.perform(SendMessage(pair.decode.key, OFFER))
    pair.prefill.perform(SendBlocks(pair.decode.key, TICKET, 1, (0,), (BlockId(3),)))
    assert pair.take("decode") == []
    assert pair.network.deliver_all() == 4
    assert pair.take("decode") == [
        MessageArrived(pair.prefill.key, OFFER),
        BlocksArrived(pair.prefill.key, TICKET, 1, (0,)),
    ]
    assert bytes(pair.decode.memory.block(2)) == b"k" * 16


def test_block_overwritten_while_on_its_way_is_corrupt(pair: Pair) -> None:
    pair.decode.perform(AcceptBlocks(pair.prefill.key, TICKET, 1, {0: BlockId(2)}))
    pair.prefill.perform(SendBlocks(pair.decode.key, TICKET, 1, (0,), (BlockId(3),)))
    pair.prefill.memory.block(3)[:] = b"x" * 16
    pair.network.deliver_all()
    assert pair.take("decode") == [BlocksArrived(pair.prefill.key, TICKET, 1, (), (0,))]


def test_nothing_is_written_after_revoke(pair: Pair) -> None:
    pair.prefill.memory.buffer[:] = b"k" * pair.prefill.memory.nbytes
    pair.decode.perform(AcceptBlocks(pair.prefill.key, TICKET, 1, {0: BlockId(2)}))
    pair.prefill.perform(SendBlocks(pair.decode.key, TICKET, 1, (0,), (BlockId(3),)))
    pair.decode.perform(Revoke(pair.prefill.key, TICKET))
    pair.network.deliver_all()
    assert pair.take("decode") == [Revoked(pair.prefill.key, TICKET)]
    assert not any(pair.decode.memory.buffer)
    assert pair.decode.refused_pushes == 1


def test_killed_worker_is_lost_behind_what_it_had_sent(pair: Pair) -> None:
    pair.prefill.perform(SendMessage(pair.decode.key, OFFER))
    pair.network.kill(pair.prefill.key)
    pair.decode.perform(SendMessage(pair.prefill.key, OFFER))
    pair.network.deliver_all()
    assert pair.take("decode") == [
        MessageArrived(pair.prefill.key, OFFER),
        PeerLost(pair.prefill.key, "the peer died"),
    ]
    assert pair.take("prefill") == []
    assert pair.decode.linked() == []


def test_what_was_under_way_on_a_broken_link_never_arrives_on_the_next(pair: Pair) -> None:
    pair.prefill.perform(SendMessage(pair.decode.key, OFFER))
    pair.network.disconnect(pair.prefill.key, pair.decode.key)
    pair.network.reconnect()
    pair.network.deliver_all()
    lost_and_up = [PeerLost(pair.prefill.key, "the connection broke"), PeerUp(pair.prefill.key, "inproc")]
    assert pair.take("decode") == lost_and_up


def test_unlisted_worker_is_unlinked_on_both_sides(pair: Pair) -> None:
    pair.decode.set_peers([])
    pair.network.deliver_all()
    assert [type(event) for event in pair.take("decode") + pair.take("prefill")] == [PeerLost, PeerLost]
    assert pair.prefill.linked() == []
