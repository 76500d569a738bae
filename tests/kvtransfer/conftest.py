"""Workers that are linked over real sockets in one process, as the tests of the mesh need them."""

from __future__ import annotations

import contextlib
import queue
import random
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from penstock.core.ids import BlockId, SecureIds, Ticket, WorkerKey, new_epoch
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.effects import AcceptBlocks, LinkEvent, PeerUp, SendBlocks
from penstock.kvtransfer.identity import boot_id
from penstock.kvtransfer.mesh import MeshSettings, SocketMesh
from penstock.kvtransfer.session import Session, _mac
from penstock.kvtransfer.socket_link import LinkTimes
from penstock.kvtransfer.transports.tls import TlsFiles
from penstock.kvtransfer.transports.wire import Deadline, read_frame, send_frame
from penstock.protocol.messages import Fingerprint, HandoffMessage, KvHello, KvPing, KvProof, KvReady, Peer, Role

FINGERPRINT = Fingerprint(
    model="m", weights="w", dtype="f4", num_layers=3, num_kv_heads=1, head_dim=8, block_size=4, layout="block-major"
)
NUM_BLOCKS, LAYER_BYTES = 32, 256
TRANSPORTS = [("shm", "tcp"), ("tcp",)]
WAIT_S = 10.0
CLUSTER_KEY = b"one cluster"


def layer_bytes_of(fingerprint: Fingerprint) -> int:
    """One layer of one block, where the dtype is one that can be converted."""
    item_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}.get(fingerprint.dtype)
    if item_bytes is None:
        return LAYER_BYTES
    return 2 * fingerprint.block_size * fingerprint.num_kv_heads * fingerprint.head_dim * item_bytes


@dataclass
class Worker:
    mesh: SocketMesh
    memory: KVMemory
    key: WorkerKey
    role: Role
    events: queue.SimpleQueue[LinkEvent] = field(repr=False)

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
        cluster_key: bytes = CLUSTER_KEY,
        renew_s: float = 1.0,
        is_stalled: Callable[[], bool] = lambda: False,
        staging_bytes: int = 0,
        wire_dtype: str = "lossless",
        digests: bool = True,
        tls: TlsFiles | None = None,
    ) -> Worker:
        memory = KVMemory(NUM_BLOCKS, fingerprint.num_layers, layer_bytes_of(fingerprint), staging_bytes)
        events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        key = WorkerKey(worker_id, new_epoch(SecureIds()))
        mesh = SocketMesh(
            key,
            role,
            fingerprint,
            memory,
            events.put,
            runtime_dir=self.runtime_dir,
            cluster_key=cluster_key,
            settings=MeshSettings(transports, wire_dtype, digests, tls),
            times=LinkTimes(liveness_s, min(0.3, liveness_s / 5), renew_s, is_stalled),
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
    block_ids = tuple(map(BlockId, slots))
    num_layers = FINGERPRINT.num_layers
    prefill.mesh.perform(SendBlocks(decode.key, ticket, generation, ordinals, block_ids, 0, num_layers))


def accept(decode: Worker, prefill: Worker, ticket: Ticket, blocks: list[int], generation: int = 1) -> None:
    table = tuple(map(BlockId, blocks))
    num_tokens = len(table) * FINGERPRINT.block_size
    decode.mesh.perform(AcceptBlocks(prefill.key, ticket, generation, 0, len(table), table, num_tokens))


def knock(worker: Worker, unix: bool) -> socket.socket:
    """A bare connection to the worker's door."""
    address = worker.mesh._listener.address
    if unix:
        assert address.unix is not None
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.unix)
        return sock
    assert address.tcp is not None
    return socket.create_connection(address.tcp)


@dataclass
class Handmade:
    """The dialing end of a link, played by the test, frame by frame."""

    sock: socket.socket
    hello: KvHello
    session: Session

    @classmethod
    def meet(cls, worker: Worker, worker_id: str = "mallory", key: bytes = CLUSTER_KEY, **changes: Any) -> Handmade:
        """Exchange hellos over the Unix socket, up to the proofs."""
        sock = knock(worker, unix=True)
        mine = hand_hello(worker, worker_id, **changes)
        send_frame(sock, mine)
        theirs = read_frame(sock, Deadline(WAIT_S))
        assert isinstance(theirs, KvHello), theirs
        return cls(sock, theirs, Session(key, mine, theirs, is_dialer=True))

    @classmethod
    def link(cls, worker: Worker, worker_id: str = "mallory", wire_dtype: str = "", **changes: Any) -> Handmade:
        """A link that is up."""
        hand = cls.meet(worker, worker_id, **changes)
        proof = read_frame(hand.sock, Deadline(WAIT_S))
        assert isinstance(proof, KvProof)
        assert hand.session.is_proven(proof.mac)
        send_frame(hand.sock, KvProof(mac=hand.session.proof))
        hand.send(KvReady(wire_dtype=wire_dtype))
        assert hand.read() == KvReady()
        worker.wait_for(PeerUp)
        return hand

    def send(self, message: HandoffMessage) -> None:
        send_frame(self.sock, message, self.session)

    def send_body(self, body: bytes) -> None:
        """A frame with a right MAC and whatever content."""
        self.session._sent += 1
        data = body + _mac(self.session._mine, self.session._sent, body)
        self.sock.sendall(len(data).to_bytes(4, "little") + data)

    def read_any(self) -> HandoffMessage:
        return read_frame(self.sock, Deadline(WAIT_S), self.session)

    def read(self) -> HandoffMessage:
        """The next message that is no ping."""
        while isinstance(message := self.read_any(), KvPing):
            continue
        return message


def hand_hello(worker: Worker, worker_id: str = "mallory", **changes: Any) -> KvHello:
    """What a decode worker that fits would say to `worker`."""
    fields: dict[str, Any] = {
        "worker_id": worker_id,
        "epoch": "f" * 16,
        "peer_epoch": worker.key.epoch,
        "fingerprint": FINGERPRINT,
        "transports": ["shm"],
        "host_id": boot_id(),
        "num_blocks": NUM_BLOCKS,
        "block_bytes": FINGERPRINT.num_layers * LAYER_BYTES,
        "nonce": b"n" * 16,
    }
    return KvHello(**(fields | changes))


def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Wait for something another thread does and reports to nobody."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        pause.wait(0.01)
