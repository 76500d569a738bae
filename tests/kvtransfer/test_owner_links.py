"""Links between workers that keep their blocks in one memory: gifts stay, others are copied, who gets such a link."""

from __future__ import annotations

import contextlib
import logging
import queue
import random
from collections.abc import Iterator

import msgspec
import pytest

from penstock.core.errors import ConfigError
from penstock.core.ids import BlockId, SecureIds, WorkerKey, new_epoch, new_ticket
from penstock.engine.kv_memory import KVMemory
from penstock.engine.ledger import Ledger, ledger_bytes, tag_of
from penstock.kvtransfer.effects import BlocksArrived, LinkEvent, MessageArrived, PeerUp, SendBlocks, SendMessage
from penstock.kvtransfer.identity import boot_id
from penstock.kvtransfer.mesh import MeshSettings, SocketMesh
from penstock.kvtransfer.socket_link import LinkTimes
from penstock.kvtransfer.transports.owner import OwnerTransport
from penstock.protocol.messages import Fingerprint, Offer, Role

from .conftest import CLUSTER_KEY, FINGERPRINT, LAYER_BYTES, NUM_BLOCKS, Cluster, Worker, accept, push

SHARES = (NUM_BLOCKS // 2, NUM_BLOCKS // 2)
P, D = 1, 2
ALL = ("owner", "shm", "tcp")


class Sharing(Cluster):
    """Workers of one memory: random bytes everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = KVMemory(NUM_BLOCKS, FINGERPRINT.num_layers, LAYER_BYTES, 64 << 20)
        self.memory.buffer[:] = random.Random(5).randbytes(self.memory.nbytes)
        self.ledger = Ledger(memoryview(bytearray(ledger_bytes(SHARES))), SHARES)

    def owner(
        self, role: Role, number: int, transports: tuple[str, ...] = ALL, fingerprint: Fingerprint = FINGERPRINT
    ) -> Worker:
        return self.join(role, OwnerTransport(self.memory, self.ledger, number, boot_id()), transports, fingerprint)

    def join(
        self,
        role: Role,
        owner: OwnerTransport | None,
        transports: tuple[str, ...] = ALL,
        fingerprint: Fingerprint = FINGERPRINT,
    ) -> Worker:
        events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        key = WorkerKey(f"{role}-0", new_epoch(SecureIds()))
        mesh = SocketMesh(
            key,
            role,
            fingerprint,
            self.memory,
            events.put,
            runtime_dir=self.runtime_dir,
            cluster_key=CLUSTER_KEY,
            settings=MeshSettings(transports),
            times=LinkTimes(30.0),
            owner=owner,
        )
        self.workers.append(Worker(mesh, self.memory, key, role, events))
        return self.workers[-1]

    def linked(self) -> str:
        """The transport by which all are linked."""
        self.introduce()
        (name,) = {event.transport for w in self.workers if isinstance(event := w.wait_for(PeerUp), PeerUp)}
        return name


@pytest.fixture
def sharing() -> Iterator[Sharing]:
    with contextlib.closing(Sharing()) as sharing:
        yield sharing


def arrived(worker: Worker) -> BlocksArrived:
    event = worker.wait_for(BlocksArrived)
    assert isinstance(event, BlocksArrived)
    return event


def test_gifts_stay_where_they_are_and_the_rest_is_copied(sharing: Sharing, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prefill, decode = sharing.owner("prefill", P), sharing.owner("decode", D)
    assert sharing.linked() == "owner"
    assert "uses owner (both keep their blocks in one memory; a block changes its owner)" in caplog.text
    ticket, before = new_ticket(SecureIds()), bytes(sharing.memory.buffer)
    accept(decode, prefill, ticket, [20, 21, 22, 23], generation=7)
    sharing.ledger.give([BlockId(3), BlockId(6)], P, D, tag_of(7))
    push(prefill, decode, ticket, [3, 4, 5, 6], generation=7)
    event = arrived(decode)
    assert (event.ordinals, event.corrupt, event.given) == ((0, 1, 2, 3), (), ((0, 3), (3, 6)))
    size = sharing.memory.block_bytes
    copied = before[4 * size : 6 * size]
    assert bytes(sharing.memory.buffer) == before[: 21 * size] + copied + before[23 * size :], "nothing else has moved"


def test_block_given_under_another_grant_is_no_gift(sharing: Sharing) -> None:
    prefill, decode = sharing.owner("prefill", P), sharing.owner("decode", D)
    assert sharing.linked() == "owner"
    ticket, other = new_ticket(SecureIds()), new_ticket(SecureIds())
    accept(decode, prefill, ticket, [20], generation=7)
    sharing.ledger.give([BlockId(3)], P, D, tag_of(6))
    push(prefill, decode, ticket, [3], generation=7)
    assert (arrived(decode).corrupt, sharing.memory.block(20) == sharing.memory.block(3)) == ((0,), False)
    accept(decode, prefill, other, [21], generation=8)
    push(prefill, decode, other, [4], generation=8)
    assert (arrived(decode).corrupt, sharing.memory.block(21) == sharing.memory.block(4)) == ((), True)


def test_withdrawn_push_whose_blocks_went_to_others_does_not_end_the_link(sharing: Sharing) -> None:
    """The source has cancelled it and gives its blocks away while the push is still on its way."""
    prefill, decode = sharing.owner("prefill", P), sharing.owner("decode", D)
    assert sharing.linked() == "owner"
    ticket = new_ticket(SecureIds())
    accept(decode, prefill, ticket, [20, 21], generation=7)
    sharing.ledger.give([BlockId(3)], P, D)
    push(prefill, decode, ticket, [3, 4], generation=7)
    assert arrived(decode).corrupt == (0, 1)
    offer = Offer(ticket=bytes(16), num_tokens=1, num_blocks=1, block_size=4, reached=1)
    prefill.mesh.perform(SendMessage(decode.key, offer))
    assert decode.wait_for(MessageArrived) == MessageArrived(prefill.key, offer)


def test_block_that_comes_in_parts_is_copied(sharing: Sharing) -> None:
    prefill, decode = sharing.owner("prefill", P), sharing.owner("decode", D)
    assert sharing.linked() == "owner"
    ticket = new_ticket(SecureIds())
    accept(decode, prefill, ticket, [20], generation=7)
    for first_layer, num_layers in ((0, 1), (1, 2)):
        parts = SendBlocks(decode.key, ticket, 7, (0,), (BlockId(3),), first_layer, num_layers)
        prefill.mesh.perform(parts)
    event = arrived(decode)
    assert (event.ordinals, event.given) == ((0,), ())
    assert sharing.memory.block(20) == sharing.memory.block(3)


@pytest.mark.parametrize("number", [P, 3])
def test_peer_without_a_number_of_its_own_gets_a_link_that_copies(
    sharing: Sharing, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sharing.owner("prefill", P)
    sharing.owner("decode", number)
    assert sharing.linked() == "shm"
    assert "no change of owner: owner: " in caplog.text


def test_peer_with_another_memory_gets_a_link_that_copies(sharing: Sharing) -> None:
    other = KVMemory(NUM_BLOCKS, FINGERPRINT.num_layers, LAYER_BYTES)
    sharing.owner("prefill", P)
    sharing.join("decode", OwnerTransport(other, sharing.ledger, D, boot_id()))
    assert sharing.linked() == "shm"
    other.close()


def test_peer_that_is_no_owner_gets_a_link_that_copies(sharing: Sharing) -> None:
    sharing.owner("prefill", P)
    sharing.join("decode", None, ("shm", "tcp"))
    assert sharing.linked() == "shm"


def test_peer_of_another_format_gets_a_link_that_converts(sharing: Sharing, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    wide = msgspec.structs.replace(FINGERPRINT, dtype="float32", head_dim=8)
    sharing.owner("prefill", P, fingerprint=wide)
    sharing.owner("decode", D, fingerprint=msgspec.structs.replace(wide, dtype="float16", block_size=8))
    assert sharing.linked() == "shm"
    assert "no change of owner: the cache formats differ" in caplog.text


def test_owner_needs_a_transport(sharing: Sharing) -> None:
    with pytest.raises(ConfigError, match=r"choose from \['shm', 'tcp'"):
        sharing.join("decode", None, ("owner",))
