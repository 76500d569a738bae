"""Meshes over real sockets in one process: blocks, who may link and how, and what is left at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.core.errors import ConfigError
from penstock.core.ids import BlockId, SecureIds, WorkerKey, new_ticket
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer import socket_link
from penstock.kvtransfer.destination import DestinationTable
from penstock.kvtransfer.digest import block_digest, combined_digest, digests
from penstock.kvtransfer.effects import (
    Advanced,
    BlocksArrived,
    DestinationEffect,
    MessageArrived,
    Offered,
    PeerLost,
    PeerUp,
    Received,
    ReceiveFailed,
    Revoke,
    Revoked,
    SendMessage,
    SourceEffect,
    SourceEnded,
)
from penstock.kvtransfer.incoming import Granting
from penstock.kvtransfer.mesh import MeshSettings, SocketMesh
from penstock.kvtransfer.source import HandoffPlan, PushSizes, SourceTable
from penstock.protocol.messages import Ack, Done, Grant, HandoffMessage, Offer, Phases, Reached

from .conftest import FINGERPRINT, NUM_BLOCKS, TRANSPORTS, WAIT_S, Cluster, Worker, accept, knock, push, until

NUM_LAYERS = FINGERPRINT.num_layers


def offer_of(num_tokens: int) -> Offer:
    return Offer(ticket=b"t" * 16, num_tokens=num_tokens, num_blocks=1, block_size=4, reached=1)


# ---- blocks ----


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_blocks_of_random_bytes_arrive_exactly_and_nothing_else_changes(
    cluster: Cluster, transports: tuple[str, ...]
) -> None:
    prefill, decode = cluster.pair(transports)
    assert decode.mesh.linked() == [(prefill.key, transports[0])]
    rng = random.Random(1)
    for count in (1, 2, 7, 20):
        ticket = new_ticket(SecureIds())
        slots = sorted(rng.sample(range(NUM_BLOCKS), count))  # runs and single blocks
        blocks = rng.sample(range(NUM_BLOCKS), count)
        decode.memory.buffer[:] = bytes(decode.memory.nbytes)
        accept(decode, prefill, ticket, blocks)
        push(prefill, decode, ticket, slots)
        digests = [combined_digest([(0, NUM_LAYERS, block_digest(prefill.memory.block(slot)))]) for slot in slots]
        arrived = BlocksArrived(prefill.key, ticket, 1, tuple(range(count)), (), tuple(digests))
        assert decode.wait_for(BlocksArrived) == arrived
        for slot, block in zip(slots, blocks, strict=True):
            assert decode.memory.block(block) == prefill.memory.block(slot)
        for block in set(range(NUM_BLOCKS)) - set(blocks):
            assert not any(decode.memory.block(block))


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_byte_flipped_after_the_digest_is_reported_corrupt(
    cluster: Cluster, transports: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    victims: list[bytes] = []

    def digest_then_flip(region: memoryview, places: Sequence[tuple[int, int]]) -> bytes:
        found = digests(region, places)
        if threading.current_thread().name.startswith("kv-send"):
            for offset, nbytes in places:
                region[offset + 100] ^= region[offset : offset + nbytes] in victims
        return found

    monkeypatch.setattr(socket_link, "digests", digest_then_flip)
    prefill, decode = cluster.pair(transports)
    victims.append(bytes(prefill.memory.block(9)))
    ticket = new_ticket(SecureIds())
    accept(decode, prefill, ticket, [0, 1, 2])
    push(prefill, decode, ticket, [8, 9, 10])
    arrived = decode.wait_for(BlocksArrived)
    assert isinstance(arrived, BlocksArrived)
    assert (arrived.ordinals, arrived.corrupt, len(arrived.digests)) == ((0, 2), (1,), 2)


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_push_that_is_not_accepted_writes_nothing_and_the_link_goes_on(
    cluster: Cluster, transports: tuple[str, ...]
) -> None:
    prefill, decode = cluster.pair(transports)
    revoked, wrong, good = (new_ticket(SecureIds()) for _ in range(3))
    accept(decode, prefill, revoked, [0, 1])
    decode.mesh.perform(Revoke(prefill.key, revoked))
    assert decode.wait_for(Revoked) == Revoked(prefill.key, revoked)
    accept(decode, prefill, wrong, [2, 3], generation=2)
    push(prefill, decode, revoked, [5, 6])
    push(prefill, decode, wrong, [5, 6], generation=1)
    push(prefill, decode, new_ticket(SecureIds()), [5, 6])
    accept(decode, prefill, good, [4])
    push(prefill, decode, good, [7])
    push(prefill, decode, good, [8])  # all is in: a second push is late
    arrived = decode.wait_for(BlocksArrived)
    assert isinstance(arrived, BlocksArrived)
    assert (arrived.ticket, arrived.ordinals, arrived.corrupt) == (good, (0,), ())
    prefill.mesh.perform(SendMessage(decode.key, offer_of(1)))
    decode.wait_for(MessageArrived)
    ticket = new_ticket(SecureIds())
    accept(decode, prefill, ticket, [20])
    push(prefill, decode, ticket, [21])
    decode.wait_for(BlocksArrived)
    assert decode.memory.block(4) == prefill.memory.block(7)
    assert not any(b for block in range(4) for b in decode.memory.block(block))
    assert decode.mesh.refused_pushes == 4


class HandOff:
    """Both tables over a linked pair: carries effects out and events in."""

    def __init__(self, prefill: Worker, decode: Worker) -> None:
        self.prefill, self.decode = prefill, decode
        self.source = SourceTable(10.0, 5.0, PushSizes(NUM_LAYERS, most=64, least=1))
        self.destination = DestinationTable(10.0)
        self.told: list = []  # effects for the roles

    def carry(self, effects: Sequence[SourceEffect | DestinationEffect]) -> None:
        for effect in effects:
            match effect:
                case Offered() | Advanced() | Received() | ReceiveFailed() | SourceEnded():
                    self.told.append(effect)
                case _:
                    worker = self.decode if effect.peer == self.prefill.key else self.prefill
                    worker.mesh.perform(effect)

    def hear(self, worker: Worker) -> HandoffMessage | BlocksArrived:
        """Take the next event of one side in."""
        event = worker.events.get(timeout=WAIT_S)
        if isinstance(event, BlocksArrived):
            self.carry(self.destination.on_arrived(event, 0.0))
            return event
        assert isinstance(event, MessageArrived), event
        table = self.source if worker is self.prefill else self.destination
        self.carry(table.on_message(event.peer, event.message, 0.0))
        return event.message


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_whole_hand_off_with_both_tables_over_sockets(cluster: Cluster, transports: tuple[str, ...]) -> None:
    """In two portions, the first of them layer by layer: what Done says of each block is what decode has verified."""
    prefill, decode = cluster.pair(transports)
    handoff, ticket, proof = HandOff(prefill, decode), new_ticket(SecureIds()), b"p" * 16
    source, destination = handoff.source, handoff.destination
    slots, table = [BlockId(n) for n in (3, 4, 5, 9, 1)], tuple(BlockId(n) for n in (31, 30, 2, 8, 20))
    handoff.carry(destination.expect(ticket, prefill.key, 0.0, proof))
    handoff.carry(source.open(ticket, decode.key, HandoffPlan(18, 5, 4, 4, proof), 0.0))
    assert isinstance(handoff.hear(decode), Offer)
    handoff.carry(destination.grant(ticket, Granting(2, 4, 2, table[:4]), 0.0))
    assert handoff.hear(prefill) == Grant(ticket, 1, 2, 4)
    for num_layers in range(1, NUM_LAYERS + 1):
        handoff.carry(source.layers_computed(ticket, slots[:4], num_layers, 0.0))
    arrived = handoff.hear(decode)
    assert isinstance(arrived, BlocksArrived)
    assert arrived.ordinals == (2, 3)
    handoff.carry(source.reach(ticket, 5, 0.0))
    assert handoff.hear(decode) == Reached(ticket, 5)
    handoff.carry(destination.grant(ticket, Granting(2, 5, 2, table), 0.0))
    assert handoff.hear(prefill) == Grant(ticket, 1, 2, 5)
    handoff.carry(source.seal(ticket, slots, (), Phases(), 0.0))
    assert {type(handoff.hear(decode)) for _ in range(2)} == {BlocksArrived, Done}
    assert handoff.hear(prefill) == Ack(ticket, 1)
    assert [type(item) for item in handoff.told] == [Offered, Advanced, Received, SourceEnded]
    assert [bytes(decode.memory.block(b)) for b in table[2:]] == [bytes(prefill.memory.block(s)) for s in slots[2:]]
    assert source.stale == destination.stale == 0


def test_two_workers_with_both_roles_share_one_link_for_both_directions(cluster: Cluster) -> None:
    for transports in TRANSPORTS:
        one, two = (cluster.worker("both", f"both-{n}-{transports[0]}", transports) for n in range(2))
        for worker in (one, two):
            worker.mesh.set_peers([one.peer, two.peer])
            worker.memory.buffer[:] = os.urandom(worker.memory.nbytes)
        for worker in (one, two):
            worker.wait_for(PeerUp)
        for source, destination in ((one, two), (two, one)):
            ticket = new_ticket(SecureIds())
            accept(destination, source, ticket, [3])
            push(source, destination, ticket, [7])
            destination.wait_for(BlocksArrived)
            assert destination.memory.block(3) == source.memory.block(7)


def test_messages_arrive_in_order(cluster: Cluster) -> None:
    prefill, decode = cluster.pair(("shm", "tcp"))
    for number in range(500):
        prefill.mesh.perform(SendMessage(decode.key, offer_of(number)))
    for number in range(500):
        event = decode.wait_for(MessageArrived)
        assert isinstance(event, MessageArrived)
        assert isinstance(event.message, Offer)
        assert event.message.num_tokens == number


# ---- who may link, and how ----


def test_other_fingerprint_is_refused_by_name_logged_on_both_sides_and_not_tried_again(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prefill = cluster.worker("prefill", "prefill-0")
    decode = cluster.worker("decode", "decode-0", fingerprint=msgspec.structs.replace(FINGERPRINT, block_size=8))
    cluster.introduce()
    until(lambda: sum("block_size differs" in record.getMessage() for record in caplog.records) == 2)
    decode.mesh.set_peers([prefill.peer, decode.peer])
    until(lambda: not any("kv-dial" in thread.name for thread in threading.enumerate()))
    assert (prefill.mesh.linked(), decode.mesh.linked()) == ([], [])
    assert prefill.events.empty()
    assert decode.events.empty()


def test_other_epoch_is_refused_by_name(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = cluster.worker("prefill", "prefill-0"), cluster.worker("decode", "decode-0")
    decode.mesh.set_peers([msgspec.structs.replace(prefill.peer, epoch="0" * 16)])
    until(lambda: sum("epoch differs" in record.getMessage() for record in caplog.records) == 2)
    assert prefill.key.epoch not in caplog.text
    assert prefill.events.empty()


def test_no_common_transport_is_refused_by_name(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster.worker("prefill", "prefill-0", ("shm",))
    cluster.worker("decode", "decode-0", ("tcp",))
    cluster.introduce()
    until(lambda: sum("transports differs" in record.getMessage() for record in caplog.records) == 2)


def test_missing_unix_socket_falls_back_to_tcp_with_the_reason(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prefill, decode = cluster.worker("prefill", "prefill-0"), cluster.worker("decode", "decode-0")
    (cluster.runtime_dir / "kv-prefill-0.sock").unlink()
    decode.mesh.set_peers([prefill.peer])
    assert decode.wait_for(PeerUp) == PeerUp(prefill.key, "tcp")
    assert "uses tcp (no shared memory: Unix socket" in caplog.text


def test_worker_no_longer_listed_loses_its_link(cluster: Cluster) -> None:
    prefill, decode = cluster.pair(("shm", "tcp"))
    decode.mesh.set_peers([decode.peer])
    decode.wait_for(PeerLost)
    prefill.wait_for(PeerLost)
    assert decode.mesh.linked() == []
    decode.mesh.perform(SendMessage(prefill.key, Ack(ticket=b"t" * 16, generation=1)))  # dropped


def test_new_incarnation_at_the_same_path_is_linked(cluster: Cluster) -> None:
    prefill, decode = cluster.pair(("shm", "tcp"))
    successor = cluster.worker("prefill", "prefill-0")
    decode.mesh.set_peers([successor.peer])
    events = {type(decode.events.get(timeout=WAIT_S)) for _ in range(2)}
    assert events == {PeerLost, PeerUp}
    prefill.mesh.close()
    assert (cluster.runtime_dir / "kv-prefill-0.sock").exists()
    assert decode.mesh.linked() == [(successor.key, "shm")]


def test_unsafe_settings_are_refused(tmp_path: Path) -> None:
    memory = KVMemory(1, 1, 64)

    def mesh(worker_id: str = "w", **options: Any) -> SocketMesh:
        key = WorkerKey(worker_id, "0" * 16)
        return SocketMesh(key, "decode", FINGERPRINT, memory, print, cluster_key=b"k" * 32, **options)

    os.chmod(tmp_path, 0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        mesh(runtime_dir=tmp_path)
    os.chmod(tmp_path, 0o700)
    with pytest.raises(ConfigError, match="longer than 107"):
        mesh(runtime_dir=tmp_path, worker_id="w" * 200)
    with pytest.raises(ConfigError, match="loopback"):
        mesh(runtime_dir=tmp_path, host="0.0.0.0")
    for transports in (("rdma",), ("shm", "rdma"), ()):
        with pytest.raises(ConfigError, match="choose from"):
            mesh(runtime_dir=tmp_path, settings=MeshSettings(transports))
    assert list(tmp_path.iterdir()) == []
    memory.close()


# ---- the end ----


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_close_leaves_no_thread_descriptor_or_file(transports: tuple[str, ...]) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    cluster = Cluster()
    prefill, decode = cluster.pair(transports)
    ticket = new_ticket(SecureIds())
    accept(decode, prefill, ticket, [1])
    push(prefill, decode, ticket, [2])
    decode.wait_for(BlocksArrived)
    with knock(prefill, unix=False):
        started = time.monotonic()
        for worker in cluster.workers:
            worker.mesh.close()
            worker.mesh.close()
        assert time.monotonic() - started < 2.0
    assert list(cluster.runtime_dir.iterdir()) == []
    cluster.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_descriptors_are_not_inherited(cluster: Cluster) -> None:
    """A forked child that held the control socket would keep a dead peer alive."""
    cluster.pair(("shm", "tcp"))
    inheritable = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith(("socket:", "/memfd:")) and os.get_inheritable(int(name)) and int(name) > 2:
                inheritable.append(target)
    assert inheritable == []
