"""One end of a measured link, a process of its own: `python -m penstock.kvtransfer.bench_peer ROLE SETTINGS`.

The real mesh, link and hand-off tables over a pool of random bytes, with no engine and no router. Commands come as JSON
lines on stdin, answers leave on stdout; `transfer_bench.py` drives two of these.
"""

from __future__ import annotations

import json
import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..core.ids import BlockId, SecureIds, Ticket, WorkerKey, new_epoch
from ..engine.kv_memory import KVMemory
from ..protocol.messages import Fingerprint, Peer, Phases
from .bench_owner import OwnedBlocks
from .bench_socket import PlainSocket, send_plainly
from .destination import DestinationTable
from .effects import (
    BlocksArrived,
    LinkEvent,
    MessageArrived,
    Offered,
    PeerUp,
    Received,
    ReceiveFailed,
    SendBlocks,
    SourceEnded,
)
from .incoming import Granting
from .mesh import MeshSettings, SocketMesh
from .ownership import TRANSPORT as OWNER
from .socket_link import LinkTimes
from .source import HandoffPlan, PushSizes, SourceTable

PATIENCE_S = 60.0
STAGING_BYTES = 64 << 20


class BenchSettings(msgspec.Struct, frozen=True):
    """What both ends of one measured pair agree on. Sizes are those of a real model's cache."""

    transport: str
    runtime_dir: str
    cluster_key: bytes
    num_blocks: int
    num_layers: int = 30
    num_kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 16
    dtype: str = "bfloat16"
    wire_dtype: str = "lossless"
    digests: bool = True

    @property
    def layer_bytes(self) -> int:
        itemsize = 4 if self.dtype == "float32" else 2
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * itemsize


class BenchPeer:
    """A role without scheduling: everything offered is granted, everything to send is computed already."""

    def __init__(self, role: str, settings: BenchSettings) -> None:
        self._settings = settings
        self.key = WorkerKey(f"bench-{role}", new_epoch(SecureIds()))
        sizes = (settings.num_blocks, settings.num_layers, settings.layer_bytes)
        is_owner = settings.transport == OWNER
        self._owned = OwnedBlocks(self.key.worker_id, *sizes, settings.block_size) if is_owner else None
        self.memory = KVMemory(*sizes, STAGING_BYTES) if self._owned is None else self._owned.memory
        _fill(self.memory, seed=len(role))
        self._events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        fingerprint = Fingerprint(
            model="bench",
            weights="-",
            dtype=settings.dtype,
            num_layers=settings.num_layers,
            num_kv_heads=settings.num_kv_heads,
            head_dim=settings.head_dim,
            block_size=settings.block_size,
            layout="block-major",
        )
        self.mesh = SocketMesh(
            self.key,
            "prefill" if role == "source" else "decode",
            fingerprint,
            self.memory,
            self._events.put,
            runtime_dir=Path(settings.runtime_dir),
            cluster_key=settings.cluster_key,
            settings=MeshSettings((settings.transport,), settings.wire_dtype, settings.digests),
            times=LinkTimes(liveness_s=PATIENCE_S),
            owner=self._owned.transport if self._owned is not None else None,
        )
        self._role = role
        self._source = SourceTable(PATIENCE_S, PATIENCE_S, PushSizes.of(settings.num_layers, settings.layer_bytes))
        self._destination = DestinationTable(PATIENCE_S)
        self._ended: dict[Ticket, tuple[float, str]] = {}
        self._peer: WorkerKey | None = None

    def introduction(self) -> dict[str, str]:
        role = "prefill" if self._role == "source" else "decode"
        return {"worker_id": self.key.worker_id, "epoch": self.key.epoch, "role": role, "kv_address": self.mesh.address}

    def connect(self, peer: dict[str, Any]) -> dict[str, Any]:
        """Until the link is up; its transport."""
        self.mesh.set_peers([Peer(**peer)])
        event = self._events.get(timeout=PATIENCE_S)
        if not isinstance(event, PeerUp):
            raise RuntimeError(f"no link: {event}")
        self._peer = event.peer
        return {"transport": event.transport}

    def expect(self, jobs: list[list[Any]]) -> dict[str, Any]:
        assert self._peer is not None
        for ticket, _ in jobs:
            self._perform(self._destination.expect(Ticket(bytes.fromhex(ticket)), self._peer, time.monotonic()))
        return {}

    def open(self, jobs: list[list[Any]]) -> dict[str, Any]:
        """Offer all of `jobs` (ticket, number of blocks) at once; when, and the end of each."""
        assert self._peer is not None
        opened: list[float] = []
        cpu = time.process_time()
        first = 0
        for text, count in jobs:
            now, ticket = time.monotonic(), Ticket(bytes.fromhex(text))
            plan = HandoffPlan(count * self._settings.block_size, count, self._settings.block_size, count)
            table = self._table(ticket, first, count)
            first += count
            opened.append(now)
            self._perform(self._source.open(ticket, self._peer, plan, now))
            self._perform(self._source.seal(ticket, table, (), Phases(), now))
        ends = self._until_ended(jobs)
        return {"opened": opened, "codes": [code for _, code in ends], "cpu_s": time.process_time() - cpu}

    def receive(self, jobs: list[list[Any]]) -> dict[str, Any]:
        """When each of `jobs` was here and verified."""
        cpu = time.process_time()
        ends = self._until_ended(jobs)
        return {
            "received": [moment for moment, _ in ends],
            "codes": [code for _, code in ends],
            "cpu_s": time.process_time() - cpu,
        }

    def memcpy(self, num_blocks: int) -> dict[str, float]:
        """Seconds for a plain copy of so many blocks, 4 MiB at a time, between two pools in one process."""
        nbytes, piece = num_blocks * self.memory.block_bytes, 4 << 20
        source = np.frombuffer(self.memory.buffer, np.uint8)[:nbytes]
        target = self._copy_target(nbytes)
        started = time.perf_counter()
        for at in range(0, nbytes, piece):
            np.copyto(target[at : at + piece], source[at : at + piece])
        return {"seconds": time.perf_counter() - started}

    def listen(self, _: object) -> dict[str, int]:
        """Where a plain socket of this end listens."""
        self._plain = self._plain or PlainSocket()
        return {"port": self._plain.port}

    def receive_plainly(self, num_blocks: int) -> dict[str, float]:
        assert self._plain is not None
        return {"moment": self._plain.receive(self.memory, num_blocks * self.memory.block_bytes)}

    def send_plainly(self, job: list[int]) -> dict[str, float]:
        port, num_blocks = job
        return {"moment": send_plainly(self.memory, port, num_blocks * self.memory.block_bytes)}

    def close(self) -> None:
        self.mesh.close()
        if self._plain is not None:
            self._plain.close()

    # ---- inside ----

    def _copy_target(self, nbytes: int) -> Any:
        if not hasattr(self, "_target"):
            self._target = np.ones(nbytes, np.uint8)  # touched, as a pool in use is
        return self._target[:nbytes]

    def _until_ended(self, jobs: list[list[Any]]) -> list[tuple[float, str]]:
        tickets = [Ticket(bytes.fromhex(ticket)) for ticket, _ in jobs]
        while any(ticket not in self._ended for ticket in tickets):
            self._handle(self._events.get(timeout=PATIENCE_S))
        return [self._ended.pop(ticket) for ticket in tickets]

    def _handle(self, event: LinkEvent) -> None:
        now = time.monotonic()
        match event:
            case MessageArrived(peer=peer, message=message) if self._role == "source":
                self._perform(self._source.on_message(peer, message, now))
            case MessageArrived(peer=peer, message=message):
                self._perform(self._destination.on_message(peer, message, now))
            case BlocksArrived():
                self._perform(self._destination.on_arrived(event, now))
            case _:
                raise RuntimeError(f"the measured link broke: {event}")

    def _table(self, ticket: Ticket, first: int, count: int) -> list[BlockId]:
        if self._owned is not None:
            return self._owned.allocate(ticket, count)
        return [BlockId((first + at) % self.memory.num_blocks) for at in range(count)]

    def _exchange(self, effect: Any) -> None:
        """Blocks change their owner before the message that speaks of it leaves."""
        match effect:
            case SendBlocks() if self._owned is not None:
                self._owned.give(effect)
            case Received() if self._owned is not None:
                self._owned.take(effect)
            case SourceEnded(ticket=ticket) if self._owned is not None:
                self._owned.forget(ticket)

    def _perform(self, effects: list[Any]) -> None:
        for effect in effects:
            self._exchange(effect)
        for effect in effects:
            match effect:
                case Offered(ticket=ticket, num_blocks=count):
                    table = tuple(self._table(ticket, self._next, count))
                    self._next = (self._next + count) % self.memory.num_blocks
                    granting = Granting(held=0, stop=count, num_held=0, table=table)
                    self._perform(self._destination.grant(ticket, granting, time.monotonic()))
                case Received(ticket=ticket):
                    self._ended[ticket] = (time.monotonic(), "")
                case SourceEnded(ticket=ticket, code=code) | ReceiveFailed(ticket=ticket, code=code):
                    self._ended[ticket] = (time.monotonic(), code)
                case _:
                    self.mesh.perform(effect)

    _next = 0
    _plain: PlainSocket | None = None


def _fill(memory: KVMemory, seed: int) -> None:
    """Random bf16-like numbers, different from block to block, and every part of the memory touched."""
    pool = np.frombuffer(memory.buffer, np.uint8).reshape(memory.num_blocks, memory.block_bytes)
    noise = np.random.default_rng(seed).integers(0, 64, memory.block_bytes, dtype=np.uint8)
    for at in range(memory.num_blocks):
        pool[at] = noise + np.uint8(at % 64)


def main(argv: list[str]) -> int:
    """Serve commands until stdin ends."""
    role, settings = argv[0], msgspec.json.decode(argv[1], type=BenchSettings)
    peer = BenchPeer(role, settings)
    commands: dict[str, Callable[[Any], dict[str, Any]]] = {
        "connect": peer.connect,
        "expect": peer.expect,
        "open": peer.open,
        "receive": peer.receive,
        "memcpy": peer.memcpy,
        "listen": peer.listen,
        "receive_plainly": peer.receive_plainly,
        "send_plainly": peer.send_plainly,
    }
    _answer(peer.introduction())
    for line in sys.stdin:
        name, argument = json.loads(line)
        if name == "close":
            break
        _answer(commands[name](argument))
    peer.close()
    return 0


def _answer(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
