"""Who may become a link: every difference is refused on both sides by name, and costs nobody else anything."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from penstock.core.errors import ProtocolError
from penstock.core.ids import SecureIds, WorkerKey, new_ticket
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.effects import BlocksArrived, PeerUp
from penstock.kvtransfer.figures import MEASURED_BYTES
from penstock.kvtransfer.handshake import Refused, dial
from penstock.kvtransfer.identity import Identity, boot_id
from penstock.kvtransfer.session import Session
from penstock.kvtransfer.staging import StagingArea
from penstock.kvtransfer.transports.wire import Deadline, read_frame, send_frame
from penstock.protocol.messages import (
    KvHello,
    KvProof,
    KvReady,
    KvRefuse,
    Measure,
    Peer,
    Role,
)

from .conftest import (
    CLUSTER_KEY,
    FINGERPRINT,
    LAYER_BYTES,
    NUM_BLOCKS,
    WAIT_S,
    Cluster,
    Handmade,
    Worker,
    accept,
    push,
    until,
)

CONVERTIBLE = msgspec.structs.replace(FINGERPRINT, dtype="float32")


def other(**changes: Any) -> dict[str, Any]:
    return {"fingerprint": msgspec.structs.replace(FINGERPRINT, **changes)}


DIFFERENCES: list[tuple[str, dict[str, Any]]] = [
    ("model", other(model="another")),
    ("weights", other(weights="another")),
    ("num_layers", other(num_layers=4)),
    ("num_kv_heads", other(num_kv_heads=2)),
    ("head_dim", other(head_dim=16)),
    ("layout", other(layout="layer-major")),
    ("protocol", other(protocol=FINGERPRINT.protocol + 1)),
    ("dtype", other(dtype="float32")),  # ours is f4, which nothing converts
    ("dtype", other(dtype="int8")),
    ("block_size", other(block_size=8)),
    ("key", {"cluster_key": b"another cluster"}),
    ("key", {"cluster_key": CLUSTER_KEY + b"x"}),
    ("digests", {"digests": False}),
    ("transports", {"transports": ("shm",)}),
]


def still_works(prefill: Worker, decode: Worker) -> None:
    ticket = new_ticket(SecureIds())
    accept(decode, prefill, ticket, [1])
    push(prefill, decode, ticket, [2])
    decode.wait_for(BlocksArrived)
    assert decode.memory.block(1) == prefill.memory.block(2)


def sentences(caplog: pytest.LogCaptureFixture, field: str) -> list[tuple[str, str]]:
    """(who speaks, what differs) of every record about `field`, ours and the peer's."""
    found = []
    for record in caplog.records:
        match = re.search(rf"{field} differs: .*", record.getMessage())
        if match:
            side = "dialer" if "no more tries" in record.getMessage() else "listener"
            found.append((side, match[0]))
    return sorted(found)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(("field", "changes"), DIFFERENCES)
def test_worker_that_does_not_fit_is_refused_on_both_sides_and_good_peers_never_notice(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, role: Role, field: str, changes: dict[str, Any]
) -> None:
    """One sentence, the same on both sides, whichever of them objects; and the dialer does not try again."""
    caplog.set_level(logging.INFO)
    prefill, decode = cluster.pair(("tcp",))
    odd = cluster.worker(role, "odd", **({"transports": ("tcp",)} | changes))
    cluster.introduce()
    until(lambda: len(sentences(caplog, field)) == 2)
    dialer = odd if role == "decode" else decode
    listener = prefill if role == "decode" else odd
    until(lambda: not any(thread.name == f"kv-dial-{listener.key}" for thread in _dial_threads(dialer)))
    (one, said), (two, heard) = sentences(caplog, field)
    assert (one, two) == ("dialer", "listener")
    assert said == heard
    assert odd.mesh.linked() == []
    assert odd.events.empty()
    assert odd.key not in {key for worker in (prefill, decode) for key, _ in worker.mesh.linked()}
    still_works(prefill, decode)
    assert prefill.events.empty()
    assert decode.events.empty()


def _dial_threads(worker: Worker) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread in worker.mesh._threads]


def test_sentence_about_a_key_names_both_workers_and_not_the_key(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.worker("prefill", "prefill-0", ("tcp",))
    cluster.worker("decode", "decode-0", ("tcp",), cluster_key=b"a secret key of some length")
    cluster.introduce()
    until(lambda: len(sentences(caplog, "key")) == 2)
    assert "decode-0 and prefill-0 do not share one cluster key; give both the same key file" in caplog.text
    assert "secret" not in caplog.text


def test_format_that_can_be_converted_is_no_difference() -> None:
    for changes in ({"block_size": 8}, {"dtype": "bfloat16"}, {"dtype": "float16", "block_size": 1}):
        theirs = msgspec.structs.replace(CONVERTIBLE, **changes)
        assert CONVERTIBLE.difference(theirs) is None
        assert theirs.difference(CONVERTIBLE) is None
        assert not CONVERTIBLE.is_same_format(theirs)
    assert CONVERTIBLE.is_same_format(CONVERTIBLE)
    assert CONVERTIBLE.difference(msgspec.structs.replace(CONVERTIBLE, dtype="bfloat16", head_dim=4)) == (
        "head_dim differs: 8 here, 4 there"
    )


# ---- against a listener that does what it likes ----


class HandmadeListener:
    """The listening end of one handshake over tcp, played by the test."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(WAIT_S)
        self._open: list[socket.socket] = [self._server]
        self.key = WorkerKey("prefill-x", "c" * 16)
        self.problem: BaseException | None = None

    @property
    def peer(self) -> Peer:
        return Peer(*self.key, role="prefill", kv_address=f"tcp:127.0.0.1:{self._server.getsockname()[1]}")

    def accept(self) -> socket.socket:
        sock, _ = self._server.accept()
        self._open.append(sock)
        return sock

    def hello(self, **changes: Any) -> KvHello:
        fields: dict[str, Any] = {
            "worker_id": self.key.worker_id,
            "epoch": self.key.epoch,
            "peer_epoch": None,
            "fingerprint": FINGERPRINT,
            "transports": ["tcp"],
            "host_id": boot_id(),
            "num_blocks": NUM_BLOCKS,
            "block_bytes": FINGERPRINT.num_layers * LAYER_BYTES,
            "nonce": b"L" * 16,
            "staging_bytes": 2 * MEASURED_BYTES,
            "token": b"T" * 16,
        }
        return KvHello(**(fields | changes))

    def answer(self, key: bytes = CLUSTER_KEY, **changes: Any) -> tuple[socket.socket, Session]:
        """Hellos and our proof; what the dialer says then is up to the test."""
        control = self.accept()
        theirs = read_frame(control, Deadline(WAIT_S))
        assert isinstance(theirs, KvHello)
        mine = self.hello(**changes)
        session = Session(key, theirs, mine, is_dialer=False)
        send_frame(control, mine)
        send_frame(control, KvProof(mac=session.proof))
        return control, session

    def close(self) -> None:
        for sock in self._open:
            sock.close()


@pytest.fixture
def listener() -> Iterator[HandmadeListener]:
    with contextlib.closing(HandmadeListener()) as listener:
        yield listener


@pytest.fixture
def me() -> Iterator[Identity]:
    memory = KVMemory(NUM_BLOCKS, FINGERPRINT.num_layers, LAYER_BYTES, 2 * MEASURED_BYTES)
    key = WorkerKey("decode-0", "d" * 16)
    yield Identity(key, "decode", FINGERPRINT, ("tcp",), boot_id(), memory, StagingArea(memory), CLUSTER_KEY)
    memory.close()


@contextlib.contextmanager
def dialing(me: Identity, peer: Peer, timeout_s: float = WAIT_S) -> Iterator[list[BaseException]]:
    """Dial on another thread; what it raises is in the list afterwards."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            dial(me, peer, timeout_s).close()
        except (OSError, ProtocolError, Refused) as err:
            raised.append(err)

    thread = threading.Thread(target=run)
    thread.start()
    yield raised
    thread.join(timeout=WAIT_S)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"worker_id": "prefill-y"}, "expected prefill-x@cccccc, met prefill-y@cccccc"),
        ({"epoch": "e" * 16}, "met prefill-x@eeeeee"),
        ({"transports": ["shm"]}, "transports differs"),
        ({"transports": ["tcp", "shm"]}, "transports differs"),
        ({"transports": []}, "transports differs"),
        ({"fingerprint": msgspec.structs.replace(FINGERPRINT, weights="x")}, "weights differs: 'w' here, 'x' there"),
        ({"digests": False}, "digests differs"),
    ],
)
def test_dialer_tells_the_listener_why_it_refuses(
    listener: HandmadeListener, me: Identity, changes: dict[str, Any], text: str
) -> None:
    with dialing(me, listener.peer) as raised:
        control, _ = listener.answer(**changes)
        refusal = read_frame(control, Deadline(WAIT_S))
    assert isinstance(refusal, KvRefuse)
    assert text in refusal.reason
    (err,) = raised
    assert isinstance(err, Refused)
    assert str(err) == refusal.reason


def test_dialer_shows_its_proof_only_to_who_has_proven_the_key(listener: HandmadeListener, me: Identity) -> None:
    """A stranger at the listener's address learns nothing that would let it pass for the dialer."""
    with dialing(me, listener.peer) as raised:
        control, _ = listener.answer(key=b"guessed")
        refusal = read_frame(control, Deadline(WAIT_S))
    assert isinstance(refusal, KvRefuse)
    assert "key differs" in refusal.reason
    assert isinstance(raised[0], Refused)


@pytest.mark.parametrize("moment", ["hello", "proof", "measure", "ready"])
def test_listener_that_falls_silent_costs_the_dialer_its_timeout_and_no_more(
    listener: HandmadeListener, me: Identity, moment: str
) -> None:
    started = time.monotonic()
    with dialing(me, listener.peer, timeout_s=0.5) as raised:
        if moment == "hello":
            listener.accept()
        else:
            staging_bytes = 0 if moment == "ready" else 2 * MEASURED_BYTES
            control, session = listener.answer(staging_bytes=staging_bytes)
            assert isinstance(read_frame(control, Deadline(WAIT_S)), KvProof)
            if moment != "proof":
                listener.accept()
                expected = Measure if moment == "measure" else KvReady
                assert isinstance(read_frame(control, Deadline(WAIT_S), session), expected)
    assert 0.4 < time.monotonic() - started < WAIT_S / 2
    assert len(raised) == 1


# ---- against a dialer that does what it likes ----


def hand_linked(cluster: Cluster, **changes: Any) -> tuple[Worker, Handmade]:
    """A prefill worker, and a dialer that has proven itself and said nothing more."""
    prefill = cluster.worker("prefill", "prefill-0", fingerprint=CONVERTIBLE, **changes)
    hand = Handmade.meet(prefill, fingerprint=CONVERTIBLE)
    assert isinstance(read_frame(hand.sock, Deadline(WAIT_S)), KvProof)
    send_frame(hand.sock, KvProof(mac=hand.session.proof))
    return prefill, hand


def ends_without_a_link(prefill: Worker, hand: Handmade) -> None:
    with pytest.raises((ConnectionError, TimeoutError)):
        read_frame(hand.sock, Deadline(WAIT_S), hand.session)
    assert prefill.mesh.linked() == []
    assert prefill.events.empty()
    hand.sock.close()


@pytest.mark.parametrize("wire_dtype", ["float64", "x" * 64, "lossless"])
def test_wire_dtype_that_there_is_not_ends_the_handshake(
    cluster: Cluster, wire_dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, hand = hand_linked(cluster)
    hand.send(KvReady(wire_dtype=wire_dtype))
    ends_without_a_link(prefill, hand)
    until(lambda: f"wire_dtype {wire_dtype!r} cannot carry blocks" in caplog.text)


def test_converted_link_without_staging_memory_is_turned_away_and_leaks_nothing(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, hand = hand_linked(cluster)
    hand.send(KvReady(wire_dtype="float32"))
    assert hand.read() == KvReady()
    ends_without_a_link(prefill, hand)
    until(lambda: "bytes of staging memory are left for this link; it has 0" in caplog.text)


@pytest.mark.parametrize(("staging_bytes", "nbytes"), [(0, 1), (4096, 4097), (2 * MEASURED_BYTES, MEASURED_BYTES + 1)])
def test_measuring_more_than_there_is_ends_the_handshake(
    cluster: Cluster, staging_bytes: int, nbytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, hand = hand_linked(cluster, staging_bytes=staging_bytes)
    hand.send(Measure(nbytes=nbytes))
    ends_without_a_link(prefill, hand)
    until(lambda: "Measure during the handshake" in caplog.text)


def test_proof_of_another_key_or_side_is_refused(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    prefill = cluster.worker("prefill", "prefill-0")
    for number, key in enumerate((b"guessed", CLUSTER_KEY)):
        hand = Handmade.meet(prefill, f"mallory-{number}", key)
        theirs = read_frame(hand.sock, Deadline(WAIT_S))
        assert isinstance(theirs, KvProof)
        mac = hand.session.proof if key != CLUSTER_KEY else theirs.mac  # the listener's own, sent back
        send_frame(hand.sock, KvProof(mac=mac))
        refusal = read_frame(hand.sock, Deadline(WAIT_S))
        assert isinstance(refusal, KvRefuse)
        assert "key differs" in refusal.reason
        hand.sock.close()
    assert prefill.events.empty()


def test_first_frames_of_an_earlier_handshake_replayed_open_nothing(cluster: Cluster) -> None:
    """The listener's nonce is fresh, so yesterday's hello and proof are worth nothing today."""
    prefill = cluster.worker("prefill", "prefill-0")
    first = Handmade.link(prefill, "decode-0")
    proof = first.session.proof
    again = Handmade.meet(prefill, "decode-0")
    assert isinstance(read_frame(again.sock, Deadline(WAIT_S)), KvProof)
    send_frame(again.sock, KvProof(mac=proof))
    refusal = read_frame(again.sock, Deadline(WAIT_S))
    assert isinstance(refusal, KvRefuse)
    assert prefill.mesh.linked() == [(WorkerKey("decode-0", "f" * 16), "shm")]
    first.sock.close()
    again.sock.close()


def test_good_dialer_is_linked(cluster: Cluster) -> None:
    """The control of the tests above."""
    prefill, hand = hand_linked(cluster)
    hand.send(KvReady())
    assert hand.read() == KvReady()
    assert prefill.wait_for(PeerUp) == PeerUp(WorkerKey("mallory", "f" * 16), "shm")
    hand.sock.close()
