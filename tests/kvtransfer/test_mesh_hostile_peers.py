"""A mesh against peers that are killed, frozen or hostile: they lose their own link, and nobody else anything."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.core.ids import SecureIds, Ticket, WorkerKey, new_ticket
from penstock.kvtransfer.effects import BlocksArrived, MessageArrived, PeerLost, PeerUp, SendMessage
from penstock.kvtransfer.transports.wire import frame
from penstock.protocol.messages import HandoffMessage, KvPing, KvReady, KvRefuse, Peer, Push

from .conftest import (
    CLUSTER_KEY,
    FINGERPRINT,
    NUM_BLOCKS,
    TRANSPORTS,
    WAIT_S,
    Cluster,
    Handmade,
    Worker,
    accept,
    hand_hello,
    knock,
    push,
)

CHILD = """
import sys
from pathlib import Path
from penstock.core.ids import WorkerKey
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.mesh import MeshSettings, SocketMesh
from penstock.protocol.messages import Fingerprint
import msgspec
fingerprint = msgspec.json.decode(sys.argv[1], type=Fingerprint)
mesh = SocketMesh(WorkerKey("prefill-0", "c" * 16), "prefill", fingerprint, KVMemory(32, 3, 256), lambda event: None,
                  runtime_dir=Path(sys.argv[2]), cluster_key=bytes.fromhex(sys.argv[4]),
                  settings=MeshSettings(tuple(sys.argv[3].split("+"))))
print(mesh.address, flush=True)
sys.stdin.read()
mesh.close()
"""


@contextlib.contextmanager
def child_prefill(cluster: Cluster, transports: tuple[str, ...]) -> Iterator[tuple[subprocess.Popen, Peer]]:
    arguments = [msgspec.json.encode(FINGERPRINT).decode(), str(cluster.runtime_dir), "+".join(transports)]
    command = [sys.executable, "-c", CHILD, *arguments, CLUSTER_KEY.hex()]
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


def test_garbage_at_the_door_harms_nobody(cluster: Cluster) -> None:
    prefill, decode = cluster.pair(("shm", "tcp"))
    rng = random.Random(7)
    valid = frame(hand_hello(prefill))
    bad = [b"", b"\xff" * 8, b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, valid[:-1], frame(KvPing()), valid[4:]]
    bad += [rng.randbytes(rng.randint(1, 200)) for _ in range(1000)]
    for at, data in enumerate(bad):
        with knock(prefill, unix=bool(at % 2)) as sock, contextlib.suppress(OSError):
            sock.sendall(data)
    _still_works(prefill, decode)


def test_bad_frames_close_their_own_link_and_nothing_else(cluster: Cluster) -> None:
    """2,000 bad frames of all kinds on links that are up: each ends with PeerLost, the good link never notices.

    Half of them come from somebody who knows the cluster's key, so only their content is wrong.
    """
    prefill, decode = cluster.pair(("shm", "tcp"))
    rng = random.Random(8)
    accept_threads = {thread for thread in threading.enumerate() if thread.name.startswith("kv-accept")}
    messages: list[HandoffMessage] = [hand_hello(prefill), KvRefuse(reason="x"), KvReady(), *_bad_pushes()]
    good = [frame(message)[4:] for message in messages]
    for number in range(2000):
        body = rng.choice(good) if number % 4 < 2 else _mutate(rng, rng.choice(good))
        hand = Handmade.link(prefill, f"mallory-{number}")
        with hand.sock:
            if number % 2:
                hand.send_body(body)
            else:
                hand.sock.sendall(len(body).to_bytes(4, "little") + body)
            hand.sock.shutdown(socket.SHUT_WR)
            while not isinstance(event := prefill.events.get(timeout=WAIT_S), PeerLost):
                assert isinstance(event, MessageArrived)
                assert number % 2, "a frame without a right MAC was heard"
    assert accept_threads <= set(threading.enumerate())
    _still_works(prefill, decode)


def _bad_pushes() -> list[Push]:
    def push(**changes: Any) -> Push:
        fields: dict[str, Any] = {
            "first_layer": 0,
            "num_layers": 3,
            "ordinals": [0],
            "digests": b"d" * 8,
            "source_slots": [0],
        }
        return Push(ticket=b"t" * 16, generation=1, **(fields | changes))

    wrong: list[dict[str, Any]] = [
        {"first_layer": 3},
        {"num_layers": 0},
        {"num_layers": 2**31 - 1},
        {"ordinals": [0, 0], "digests": b"d" * 16, "source_slots": [0, 1]},
        {"ordinals": [], "digests": b"", "source_slots": []},
        {"digests": b""},
        {"digests": b"d" * 9},
        {"source_slots": []},
        {"source_slots": [NUM_BLOCKS]},
        {"ordinals": list(range(NUM_BLOCKS + 1)), "digests": b"d" * 8 * (NUM_BLOCKS + 1)},
        {"source_slots": [], "staged": 0},
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
