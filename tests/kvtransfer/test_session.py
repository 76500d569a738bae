"""Two ends that share a cluster key, and everybody who does not; frames that were changed, replayed, swapped, cut."""

from __future__ import annotations

import random
import socket
from typing import Any

import msgspec
import pytest

from penstock.core.errors import ProtocolError
from penstock.kvtransfer.session import MAC_BYTES, Session
from penstock.kvtransfer.transports.wire import Deadline, frame, read_frame, send_frame
from penstock.protocol.messages import Ack, Cancel, Fingerprint, HandoffMessage, KvHello, KvPing, Renew

KEY = b"k" * 32
FINGERPRINT = Fingerprint("m", "w", "f4", 3, 1, 8, 4, "block-major")
DIALER = KvHello("decode-0", "d" * 16, "a" * 16, FINGERPRINT, ["shm", "tcp"], "host", 32, 768, b"1" * 16)
LISTENER = KvHello("prefill-0", "a" * 16, None, FINGERPRINT, ["shm"], "host", 32, 768, b"2" * 16)
MESSAGES: list[HandoffMessage] = [
    Ack(ticket=b"t" * 16, generation=3),
    Cancel(ticket=b"t" * 16, code="cancelled", message="x"),
    Renew(tickets=[b"t" * 16, b"u" * 16]),
    KvPing(),
]


def ends(key: bytes = KEY, other_key: bytes = KEY, listener: KvHello = LISTENER) -> tuple[Session, Session]:
    """The dialer's end, and the listener's, which may know another key or has said something else."""
    return (
        Session(key, DIALER, LISTENER, is_dialer=True),
        Session(other_key, DIALER, listener, is_dialer=False),
    )


def directions(**differences: Any) -> list[tuple[Session, Session]]:
    """(writer, reader) for both directions of one link."""
    dialer, listener = ends(**differences)
    return [(dialer, listener), (listener, dialer)]


def opened(reader: Session, data: bytes) -> HandoffMessage:
    return reader.open(memoryview(data))


def test_both_ends_prove_themselves_to_each_other_and_read_each_others_frames() -> None:
    dialer, listener = ends()
    assert dialer.is_proven(listener.proof)
    assert listener.is_proven(dialer.proof)
    assert dialer.name == listener.name
    for writer, reader in ((dialer, listener), (listener, dialer)):
        for message in MESSAGES * 3:
            assert opened(reader, writer.seal(message)) == message


def test_proof_is_of_one_side_and_cannot_be_sent_back() -> None:
    dialer, listener = ends()
    assert dialer.proof != listener.proof
    assert not dialer.is_proven(dialer.proof)
    assert not listener.is_proven(listener.proof)
    for wrong in (b"", bytes(MAC_BYTES), dialer.proof[:-1]):
        assert not listener.is_proven(wrong)


def _changed(**changes: Any) -> KvHello:
    return msgspec.structs.replace(LISTENER, **changes)


@pytest.mark.parametrize(
    "differences",
    [
        {"other_key": b"K" * 32},
        {"other_key": KEY[:-1]},
        {"listener": _changed(nonce=b"3" * 16)},
        {"listener": _changed(epoch="b" * 16)},
        {"listener": _changed(transports=["tcp"])},
        {"listener": _changed(num_blocks=31)},
        {"listener": _changed(token=b"t" * 16)},
    ],
    ids=["key", "short key", "nonce", "epoch", "transports", "num_blocks", "token"],
)
def test_another_key_or_a_changed_hello_proves_nothing_and_reads_nothing(differences: dict[str, Any]) -> None:
    dialer, listener = ends(**differences)
    assert not dialer.is_proven(listener.proof)
    assert not listener.is_proven(dialer.proof)
    assert dialer.name != listener.name
    for writer, reader in directions(**differences):
        with pytest.raises(ProtocolError, match="frame 1 of a hand-off link has a wrong MAC"):
            opened(reader, writer.seal(KvPing()))


@pytest.mark.parametrize("direction", [0, 1])
def test_each_changed_bit_of_a_frame_is_noticed(direction: int) -> None:
    data = bytearray(directions()[direction][0].seal(MESSAGES[0]))
    for bit in range(8 * len(data)):
        _, reader = directions()[direction]
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError, match="wrong MAC"):
            opened(reader, bytes(data))
        data[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("direction", [0, 1])
def test_frame_that_is_replayed_swapped_or_left_out_is_noticed(direction: int) -> None:
    writer, _ = directions()[direction]
    one, two, three = (writer.seal(KvPing()) for _ in range(3))
    assert len({one, two, three}) == 3
    for order, wrong_at in (((one, one), 1), ((two, one), 0), ((one, three), 1), ((one, two, one), 2)):
        _, reader = directions()[direction]
        for data in order[:wrong_at]:
            opened(reader, data)
        with pytest.raises(ProtocolError, match=f"frame {wrong_at + 1} "):
            opened(reader, order[wrong_at])


def test_frame_sent_back_to_its_writer_is_noticed() -> None:
    for writer, _ in directions():
        with pytest.raises(ProtocolError, match="wrong MAC"):
            opened(writer, writer.seal(KvPing()))


@pytest.mark.parametrize("direction", [0, 1])
def test_frame_of_any_other_length_is_noticed(direction: int) -> None:
    data = directions()[direction][0].seal(MESSAGES[1])
    for cut in [*range(len(data)), len(data) + 1, len(data) + MAC_BYTES]:
        _, reader = directions()[direction]
        with pytest.raises(ProtocolError, match="wrong MAC"):
            opened(reader, (data + bytes(MAC_BYTES))[:cut])


def test_2000_damaged_frames_are_all_refused() -> None:
    rng = random.Random(14)
    for number in range(2000):
        writer, reader = directions()[number % 2]
        good = writer.seal(rng.choice(MESSAGES))
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            match rng.randrange(3):
                case 0 if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
                case 1:
                    at = rng.randrange(len(data) + 1)
                    del data[at : at + 3]
                case _:
                    at = rng.randrange(len(data) + 1)
                    data[at:at] = rng.randbytes(2)
        if bytes(data) != good:
            with pytest.raises(ProtocolError):
                opened(reader, bytes(data))


def test_frames_on_a_socket_are_sealed_and_a_plain_one_is_refused() -> None:
    left, right = socket.socketpair()
    with left, right:
        writer, reader = ends()
        for message in MESSAGES:
            send_frame(left, message, writer)
        assert [read_frame(right, Deadline(5.0), reader) for _ in MESSAGES] == MESSAGES
        left.sendall(frame(KvPing()))
        with pytest.raises(ProtocolError, match="wrong MAC"):
            read_frame(right, Deadline(5.0), reader)
