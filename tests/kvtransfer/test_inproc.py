"""The network of the simulation: deterministic, one deliverable at a time."""

from __future__ import annotations

import pytest

from penstock.core.ids import BlockId, Ticket, WorkerKey
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.digest import block_digest, combined_digest
from penstock.kvtransfer.effects import (
    AcceptBlocks,
    BlocksArrived,
    LinkEvent,
    MessageArrived,
    PeerLost,
    PeerUp,
    Renewing,
    Revoke,
    Revoked,
    SendBlocks,
    SendMessage,
    Withdraw,
)
from penstock.kvtransfer.transports.inproc import InprocMesh, InprocNetwork
from penstock.protocol.messages import Done, Fingerprint, Offer, Peer, Phases, Renew, Role

FINGERPRINT = Fingerprint(
    model="m", weights="w", dtype="f4", num_layers=2, num_kv_heads=1, head_dim=1, block_size=4, layout="l"
)
TICKET = Ticket(b"t" * 16)
OFFER = Offer(ticket=TICKET, num_tokens=1, num_blocks=1, block_size=4, reached=1)


def accept(pair: Pair) -> None:
    """Ordinal 0 may be written into decode's block 2."""
    pair.decode.perform(AcceptBlocks(pair.prefill.key, TICKET, 1, 0, 1, (BlockId(2),), 4))


def send(pair: Pair, first_layer: int = 0, num_layers: int = 2) -> None:
    """Prefill's block 3 as ordinal 0."""
    pair.prefill.perform(SendBlocks(pair.decode.key, TICKET, 1, (0,), (BlockId(3),), first_layer, num_layers))


def digest_of(pair: Pair, *pieces: tuple[int, int]) -> bytes:
    """What Done says of prefill's block 3 when it came in these pieces."""
    memory = pair.prefill.memory
    return combined_digest((first, count, block_digest(memory.block(3, first, count))) for first, count in pieces)


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
    accept(pair)
    pair.prefill.perform(SendMessage(pair.decode.key, OFFER))
    send(pair)
    assert pair.take("decode") == []
    assert pair.network.deliver_all() == 4
    assert pair.take("decode") == [
        MessageArrived(pair.prefill.key, OFFER),
        BlocksArrived(pair.prefill.key, TICKET, 1, (0,), (), (digest_of(pair, (0, 2)),)),
    ]
    assert bytes(pair.decode.memory.block(2)) == b"k" * 16


def test_block_overwritten_while_on_its_way_is_corrupt(pair: Pair) -> None:
    accept(pair)
    send(pair)
    pair.prefill.memory.block(3)[:] = b"x" * 16
    pair.network.deliver_all()
    assert pair.take("decode") == [BlocksArrived(pair.prefill.key, TICKET, 1, (), (0,))]


def test_block_in_two_pieces_arrives_with_the_second_and_done_vouches_for_both(pair: Pair) -> None:
    pair.prefill.memory.block(3)[:] = b"k" * 8 + b"l" * 8
    accept(pair)
    send(pair, 0, 1)
    pair.network.deliver_all()
    assert pair.take("decode") == []
    send(pair, 1, 1)
    done = Done(TICKET, 1, 1, 4, (), Phases())
    pair.prefill.perform(SendMessage(pair.decode.key, done))
    pair.network.deliver_all()
    digest = digest_of(pair, (0, 1), (1, 1))
    assert pair.take("decode") == [
        BlocksArrived(pair.prefill.key, TICKET, 1, (0,), (), (digest,)),
        MessageArrived(pair.prefill.key, Done(TICKET, 1, 1, 4, (), Phases(), digest)),
    ]


def test_done_after_withdraw_vouches_for_nothing(pair: Pair) -> None:
    accept(pair)
    send(pair)
    pair.prefill.perform(Withdraw(pair.decode.key, TICKET))
    pair.prefill.perform(SendMessage(pair.decode.key, Done(TICKET, 1, 1, 4, (), Phases())))
    pair.network.deliver_all()
    (message,) = [event.message for event in pair.take("decode") if isinstance(event, MessageArrived)]
    assert isinstance(message, Done)
    assert message.digests == b""


def test_renew_names_the_tickets_that_are_alive_here(pair: Pair) -> None:
    other = Ticket(b"u" * 16)
    for ticket, is_alive in ((TICKET, True), (other, True), (other, True), (TICKET, False)):
        pair.prefill.perform(Renewing(pair.decode.key, ticket, is_alive))
    pair.prefill.renew()
    pair.decode.renew()
    pair.network.deliver_all()
    assert pair.take("decode") == [MessageArrived(pair.prefill.key, Renew(tickets=[other]))]
    assert pair.take("prefill") == []


def test_nothing_is_written_after_revoke(pair: Pair) -> None:
    pair.prefill.memory.buffer[:] = b"k" * pair.prefill.memory.nbytes
    accept(pair)
    send(pair)
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
