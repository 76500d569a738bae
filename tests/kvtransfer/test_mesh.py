"""Meshes over real sockets in one process, and against killed, frozen and hostile peers."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from penstock.core.errors import ConfigError
from penstock.core.ids import BlockId, SecureIds, Ticket, WorkerKey, new_epoch, new_ticket
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer import socket_link
from penstock.kvtransfer.destination import DestinationTable
from penstock.kvtransfer.digest import block_digest
from penstock.kvtransfer.effects import (
    AcceptBlocks,
    BlocksArrived,
    LinkEvent,
    MessageArrived,
    Offered,
    PeerLost,
    PeerUp,
    Received,
    Revoke,
    Revoked,
    SendBlocks,
    SendMessage,
    SourceEnded,
)
from penstock.kvtransfer.mesh import SocketMesh
from penstock.kvtransfer.source import SourceTable
from penstock.kvtransfer.transports.wire import Deadline, frame, read_frame, send_frame
from penstock.protocol.messages import (
    Ack,
    Fingerprint,
    KvHello,
    KvPing,
    KvRefuse,
    Offer,
    Peer,
    Phases,
    Push,
    Role,
)

FINGERPRINT = Fingerprint(
    model="m", weights="w", dtype="f4", num_layers=3, num_kv_heads=1, head_dim=8, block_size=4, layout="block-major"
)
NUM_BLOCKS, LAYER_BYTES = 32, 256
TRANSPORTS = [("shm", "tcp"), ("tcp",)]
WAIT_S = 10.0


@dataclass
class Worker:
    mesh: SocketMesh
    memory: KVMemory
    key: WorkerKey
    role: Role
    events: queue.SimpleQueue = field(repr=False)

    @property
    def peer(self) -> Peer:
        return Peer(worker_id=self.key.worker_id, epoch=self.key.epoch, role=self.role, kv_address=self.mesh.address)

    def wait_for(self, kind: type[LinkEvent], timeout_s: float = WAIT_S) -> LinkEvent:
        """The next event, which must be of this kind."""
        event: LinkEvent = self.events.get(timeout=timeout_s)
        assert isinstance(event, kind), event
        return event


class Cluster:
    """Workers in one runtime directory; everything is closed at the end."""

    def __init__(self) -> None:
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="kv-"))
        self.workers: list[Worker] = []

    def worker(
        self,
        role: Role,
        worker_id: str,
        transports: tuple[str, ...] = ("shm", "tcp"),
        fingerprint: Fingerprint = FINGERPRINT,
        liveness_s: float = 30.0,
    ) -> Worker:
        memory, events = KVMemory(NUM_BLOCKS, FINGERPRINT.num_layers, LAYER_BYTES), queue.SimpleQueue()
        key = WorkerKey(worker_id, new_epoch(SecureIds()))
        mesh = SocketMesh(
            key,
            role,
            fingerprint,
            memory,
            events.put,
            runtime_dir=self.runtime_dir,
            transports=transports,
            liveness_s=liveness_s,
            ping_s=min(0.3, liveness_s / 5),
        )
        self.workers.append(Worker(mesh, memory, key, role, events))
        return self.workers[-1]

    def introduce(self) -> None:
        peers = [worker.peer for worker in self.workers]
        for worker in self.workers:
            worker.mesh.set_peers(peers)

    def pair(self, transports: tuple[str, ...], liveness_s: float = 30.0) -> tuple[Worker, Worker]:
        """A linked prefill and decode worker; the source's pool is random, the destination's zero."""
        prefill = self.worker("prefill", "prefill-0", transports, liveness_s=liveness_s)
        decode = self.worker("decode", "decode-0", transports, liveness_s=liveness_s)
        self.introduce()
        for worker in (prefill, decode):
            worker.wait_for(PeerUp)
        prefill.memory.buffer[:] = random.Random(5).randbytes(prefill.memory.nbytes)
        return prefill, decode

    def close(self) -> None:
        for worker in self.workers:
            worker.mesh.close()
            worker.memory.close()
        shutil.rmtree(self.runtime_dir)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with contextlib.closing(Cluster()) as cluster:
        yield cluster


def push(prefill: Worker, decode: Worker, ticket: Ticket, slots: list[int], generation: int = 1) -> None:
    ordinals = tuple(range(len(slots)))
    prefill.mesh.perform(SendBlocks(decode.key, ticket, generation, ordinals, tuple(map(BlockId, slots))))


def accept(decode: Worker, prefill: Worker, ticket: Ticket, blocks: list[int], generation: int = 1) -> None:
    decode.mesh.perform(AcceptBlocks(prefill.key, ticket, generation, dict(enumerate(map(BlockId, blocks)))))


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
        assert decode.wait_for(BlocksArrived) == BlocksArrived(prefill.key, ticket, 1, tuple(range(count)))
        for slot, block in zip(slots, blocks, strict=True):
            assert decode.memory.block(block) == prefill.memory.block(slot)
        for block in set(range(NUM_BLOCKS)) - set(blocks):
            assert not any(decode.memory.block(block))


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_byte_flipped_after_the_digest_is_reported_corrupt(
    cluster: Cluster, transports: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = cluster.pair(transports)
    victim = bytes(prefill.memory.block(9))

    def digest_then_flip(block: memoryview) -> bytes:
        digest = block_digest(block)
        if threading.current_thread().name.startswith("kv-write") and block == victim:
            block[100] ^= 1
        return digest

    monkeypatch.setattr(socket_link, "block_digest", digest_then_flip)
    ticket = new_ticket(SecureIds())
    accept(decode, prefill, ticket, [0, 1, 2])
    push(prefill, decode, ticket, [8, 9, 10])
    assert decode.wait_for(BlocksArrived) == BlocksArrived(prefill.key, ticket, 1, (0, 2), (1,))


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
    assert decode.wait_for(BlocksArrived) == BlocksArrived(prefill.key, good, 1, (0,))
    prefill.mesh.perform(SendMessage(decode.key, Offer(ticket=good, num_tokens=1, num_blocks=1)))
    decode.wait_for(MessageArrived)
    ticket = new_ticket(SecureIds())
    accept(decode, prefill, ticket, [20])
    push(prefill, decode, ticket, [21])
    decode.wait_for(BlocksArrived)
    assert decode.memory.block(4) == prefill.memory.block(7)
    assert not any(b for block in range(4) for b in decode.memory.block(block))
    assert decode.mesh.refused_pushes == 4


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_whole_hand_off_with_both_tables_over_sockets(cluster: Cluster, transports: tuple[str, ...]) -> None:
    prefill, decode = cluster.pair(transports)
    source, destination, ticket = SourceTable(10.0, 5.0), DestinationTable(10.0), new_ticket(SecureIds())
    slots, blocks = [BlockId(n) for n in (3, 4, 5, 9, 1)], [BlockId(n) for n in (30, 2, 8)]
    effects = [*destination.expect(ticket, prefill.key, 0.0), *source.open(ticket, decode.key, 18, 5, 0.0)]
    ends: list = []
    while len(ends) < 2:
        for effect in effects:
            if isinstance(effect, Received | SourceEnded):
                ends.append(effect)
            elif isinstance(effect, Offered):
                effects += destination.grant(ticket, 2, blocks, 0.0)
                effects += source.seal(ticket, slots, 18, (), Phases(), 0.0)
            else:
                worker = decode if effect.peer == prefill.key else prefill
                worker.mesh.perform(effect)
        effects = _next_effects(prefill, decode, source, destination) if len(ends) < 2 else []
    assert {type(end) for end in ends} == {Received, SourceEnded}
    assert [bytes(decode.memory.block(b)) for b in blocks] == [bytes(prefill.memory.block(s)) for s in slots[2:]]
    assert source.stale == destination.stale == 0


def _next_effects(prefill: Worker, decode: Worker, source: SourceTable, destination: DestinationTable) -> list:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        for worker, table in ((decode, destination), (prefill, source)):
            with contextlib.suppress(queue.Empty):
                event = worker.events.get(timeout=0.02)
                if isinstance(event, BlocksArrived):
                    return destination.on_arrived(event, 0.0)
                assert isinstance(event, MessageArrived)
                return list(table.on_message(event.peer, event.message, 0.0))
    raise AssertionError("nothing arrived")


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
        prefill.mesh.perform(SendMessage(decode.key, Offer(ticket=b"t" * 16, num_tokens=number, num_blocks=1)))
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
    _until(lambda: sum("block_size differs" in record.getMessage() for record in caplog.records) == 2)
    decode.mesh.set_peers([prefill.peer, decode.peer])
    _until(lambda: not any("kv-dial" in thread.name for thread in threading.enumerate()))
    assert (prefill.mesh.linked(), decode.mesh.linked()) == ([], [])
    assert prefill.events.empty()
    assert decode.events.empty()


def test_other_epoch_is_refused_by_name(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = cluster.worker("prefill", "prefill-0"), cluster.worker("decode", "decode-0")
    decode.mesh.set_peers([msgspec.structs.replace(prefill.peer, epoch="0" * 16)])
    _until(lambda: sum("epoch differs" in record.getMessage() for record in caplog.records) == 2)
    assert prefill.key.epoch not in caplog.text
    assert prefill.events.empty()


def test_no_common_transport_is_refused_by_name(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster.worker("prefill", "prefill-0", ("shm",))
    cluster.worker("decode", "decode-0", ("tcp",))
    cluster.introduce()
    _until(lambda: sum("transports differs" in record.getMessage() for record in caplog.records) == 2)


def test_missing_unix_socket_falls_back_to_tcp_with_the_reason(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prefill, decode = cluster.worker("prefill", "prefill-0"), cluster.worker("decode", "decode-0")
    (cluster.runtime_dir / "kv-prefill-0.sock").unlink()
    decode.mesh.set_peers([prefill.peer])
    assert decode.wait_for(PeerUp) == PeerUp(prefill.key, "tcp")
    assert "uses tcp: no shared memory: Unix socket" in caplog.text


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

    def mesh(worker_id: str = "w", **options: object) -> SocketMesh:
        key = WorkerKey(worker_id, "0" * 16)
        return SocketMesh(key, "decode", FINGERPRINT, memory, print, **options)  # type: ignore[arg-type]

    os.chmod(tmp_path, 0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        mesh(runtime_dir=tmp_path)
    os.chmod(tmp_path, 0o700)
    with pytest.raises(ConfigError, match="longer than 107"):
        mesh(runtime_dir=tmp_path, worker_id="w" * 200)
    with pytest.raises(ConfigError, match="loopback"):
        mesh(runtime_dir=tmp_path, host="0.0.0.0")
    with pytest.raises(ConfigError, match="transports"):
        mesh(runtime_dir=tmp_path, transports=("rdma",))
    assert list(tmp_path.iterdir()) == []
    memory.close()


# ---- dead, frozen and hostile peers ----

CHILD = """
import sys
from pathlib import Path
from penstock.core.ids import WorkerKey
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.mesh import SocketMesh
from penstock.protocol.messages import Fingerprint
import msgspec
fingerprint = msgspec.json.decode(sys.argv[1], type=Fingerprint)
mesh = SocketMesh(WorkerKey("prefill-0", "c" * 16), "prefill", fingerprint, KVMemory(32, 3, 256), lambda event: None,
                  runtime_dir=Path(sys.argv[2]), transports=tuple(sys.argv[3].split("+")))
print(mesh.address, flush=True)
sys.stdin.read()
mesh.close()
"""


@contextlib.contextmanager
def child_prefill(cluster: Cluster, transports: tuple[str, ...]) -> Iterator[tuple[subprocess.Popen, Peer]]:
    arguments = [msgspec.json.encode(FINGERPRINT).decode(), str(cluster.runtime_dir), "+".join(transports)]
    command = [sys.executable, "-c", CHILD, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        yield process, Peer(worker_id="prefill-0", epoch="c" * 16, role="prefill", kv_address=address)
        process.kill()


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_killed_peer_is_lost_at_once_and_its_pool_unmapped(cluster: Cluster, transports: tuple[str, ...]) -> None:
    """Bug list 20: nothing of a dead peer stays mapped."""
    decode = cluster.worker("decode", "decode-0", transports, liveness_s=60.0)
    with child_prefill(cluster, transports) as (process, peer):
        decode.mesh.set_peers([peer])
        assert decode.wait_for(PeerUp) == PeerUp(WorkerKey("prefill-0", "c" * 16), transports[0])
        process.send_signal(signal.SIGKILL)
        decode.wait_for(PeerLost, timeout_s=5.0)
    assert decode.mesh.linked() == []
    if transports[0] == "shm":
        pools = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:penstock-kv" in line]
        assert len(pools) >= 1
        assert not [line for line in pools if " r--s " in line]


def test_frozen_peer_is_lost_after_the_silence_and_linked_again_when_it_thaws(cluster: Cluster) -> None:
    decode = cluster.worker("decode", "decode-0", liveness_s=1.5)
    with child_prefill(cluster, ("shm", "tcp")) as (process, peer):
        decode.mesh.set_peers([peer])
        decode.wait_for(PeerUp)
        process.send_signal(signal.SIGSTOP)
        lost = decode.wait_for(PeerLost)
        assert isinstance(lost, PeerLost)
        assert "silent for 1.5 s" in lost.reason
        process.send_signal(signal.SIGCONT)
        decode.wait_for(PeerUp)


def _knock(worker: Worker, unix: bool) -> socket.socket:
    address = worker.mesh._listener.address
    if unix:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.unix)
        return sock
    assert address.tcp is not None
    return socket.create_connection(address.tcp)


def _hello(prefill: Worker, worker_id: str = "mallory") -> KvHello:
    return KvHello(
        worker_id=worker_id,
        epoch="f" * 16,
        peer_epoch=prefill.key.epoch,
        fingerprint=FINGERPRINT,
        transports=["shm"],
        host_id=prefill.mesh._me.host_id,
        num_blocks=NUM_BLOCKS,
    )


def _shake_hands(prefill: Worker, worker_id: str) -> socket.socket:
    """A hand-made shm link to `prefill`."""
    sock = _knock(prefill, unix=True)
    send_frame(sock, _hello(prefill, worker_id))
    assert isinstance(read_frame(sock, Deadline(WAIT_S)), KvHello)
    send_frame(sock, KvPing())
    prefill.wait_for(PeerUp)
    return sock


def test_garbage_at_the_door_harms_nobody(cluster: Cluster) -> None:
    prefill, decode = cluster.pair(("shm", "tcp"))
    rng = random.Random(7)
    valid = frame(_hello(prefill))
    bad = [b"", b"\xff" * 8, b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, valid[:-1], frame(KvPing()), valid[4:]]
    bad += [rng.randbytes(rng.randint(1, 200)) for _ in range(1000)]
    for at, data in enumerate(bad):
        with _knock(prefill, unix=bool(at % 2)) as sock, contextlib.suppress(OSError):
            sock.sendall(data)
    _still_works(prefill, decode)


def test_bad_frames_close_their_own_link_and_nothing_else(cluster: Cluster) -> None:
    """2,000 bad frames of all kinds on links that are up: each ends with PeerLost, the good link never notices."""
    prefill, decode = cluster.pair(("shm", "tcp"))
    rng = random.Random(8)
    accept_threads = {thread for thread in threading.enumerate() if thread.name.startswith("kv-accept")}
    good = [frame(message) for message in (_hello(prefill), KvRefuse(reason="x"), *_bad_pushes())]
    for number in range(2000):
        data = rng.choice(good) if number % 4 == 0 else _mutate(rng, rng.choice(good))
        with _shake_hands(prefill, f"mallory-{number}") as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while not isinstance(event := prefill.events.get(timeout=WAIT_S), PeerLost):
                assert isinstance(event, MessageArrived)
    assert accept_threads <= set(threading.enumerate())
    _still_works(prefill, decode)


def _bad_pushes() -> list[Push]:
    def push(**changes: object) -> Push:
        fields = {"first_layer": 0, "num_layers": 3, "ordinals": [0], "digests": [b"d" * 8], "source_slots": [0]}
        return Push(ticket=b"t" * 16, generation=1, **(fields | changes))  # type: ignore[arg-type]

    wrong: list[dict[str, object]] = [
        {"first_layer": 3},
        {"num_layers": 0},
        {"num_layers": 2**31 - 1},
        {"ordinals": [0, 0], "digests": [b"d" * 8] * 2},
        {"digests": []},
        {"source_slots": []},
        {"source_slots": [NUM_BLOCKS]},
        {"ordinals": list(range(NUM_BLOCKS + 1)), "digests": [b"d" * 8] * (NUM_BLOCKS + 1)},
    ]
    return [push(**changes) for changes in wrong]


def _mutate(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _still_works(prefill: Worker, decode: Worker) -> None:
    ticket = new_ticket(SecureIds())
    accept(decode, prefill, ticket, [1])
    push(prefill, decode, ticket, [2])
    decode.wait_for(BlocksArrived)
    assert decode.memory.block(1) == prefill.memory.block(2)
    assert (decode.key, "shm") in prefill.mesh.linked()


@pytest.mark.parametrize("bad_push", _bad_pushes())
def test_push_outside_the_bounds_ends_the_link_without_a_write(cluster: Cluster, bad_push: Push) -> None:
    """A prefill worker that lies about slots or layers: decode reads and writes nothing."""
    prefill, decode = cluster.pair(("shm", "tcp"))
    accept(decode, prefill, Ticket(bad_push.ticket), list(range(NUM_BLOCKS)))
    prefill.mesh.perform(SendMessage(decode.key, bad_push))
    decode.wait_for(PeerLost)
    assert not any(decode.memory.buffer)


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
    with _knock(prefill, unix=False):
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


def _until(condition: object, timeout_s: float = WAIT_S) -> None:
    """Wait for something another thread does and reports to nobody."""
    until, pause = time.monotonic() + timeout_s, threading.Event()
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, "it never happened"
        pause.wait(0.01)
