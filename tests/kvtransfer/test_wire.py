"""Frames, hostile ones above all."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator

import pytest

from penstock.core.errors import ProtocolError
from penstock.kvtransfer.transports.wire import (
    MAX_FRAME_BYTES,
    Deadline,
    Liveness,
    frame,
    read_exact,
    read_frame,
    send_frame,
    send_views,
)
from penstock.protocol.messages import Ack, Cancel, HandoffMessage, KvPing, Push, Renew


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


MESSAGES: list[HandoffMessage] = [
    Ack(ticket=b"t" * 16, generation=3),
    Cancel(ticket=b"t" * 16, code="cancelled", message="x"),
    Renew(tickets=[b"t" * 16, b"u" * 16]),
    KvPing(),
    Push(
        ticket=b"t" * 16,
        generation=1,
        first_layer=0,
        num_layers=2,
        ordinals=[1, 2],
        digests=b"d" * 16,
        source_slots=[4, 5],
    ),
]


def test_frames_sent_together_are_read_one_by_one(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    for message in MESSAGES:
        send_frame(left, message)
    assert [read_frame(right, Deadline(5.0)) for _ in MESSAGES] == MESSAGES


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_length_outside_the_bound_is_refused_before_anything_is_read(
    pair: tuple[socket.socket, socket.socket], length: int
) -> None:
    left, right = pair
    left.sendall(length.to_bytes(4, "little"))
    with pytest.raises(ProtocolError, match=f"frame of {length} bytes"):
        read_frame(right, Deadline(5.0))


def test_2000_bad_frames_give_a_protocol_error_or_a_valid_message() -> None:
    rng = random.Random(9)
    refused = 0
    for _ in range(2000):
        data = bytearray(frame(rng.choice(MESSAGES)))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(4, len(data))] = rng.randrange(256)
        left, right = socket.socketpair()
        with left, right:
            left.sendall(data)
            try:
                read_frame(right, Deadline(5.0))
            except ProtocolError:
                refused += 1
    assert refused > 1000


def test_end_of_stream_within_a_frame_is_a_connection_error(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    left.sendall(frame(MESSAGES[0])[:-1])
    left.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError, match="closed"):
        read_frame(right, Deadline(5.0))


def test_deadline_and_liveness_end_a_wait_for_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    _, right = pair
    with pytest.raises(TimeoutError, match="no answer"):
        read_frame(right, Deadline(0.01))
    with pytest.raises(TimeoutError, match="silent"):
        read_frame(right, Liveness(0.01))


def test_views_of_many_sizes_arrive_whole_through_a_small_buffer(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    left, right = pair
    rng = random.Random(4)
    views = [memoryview(rng.randbytes(size)) for size in (0, 1, 3 << 20, *rng.choices(range(5000), k=1500))]
    expected = b"".join(views)
    found = bytearray(len(expected))
    thread = threading.Thread(target=read_exact, args=(right, memoryview(found), Deadline(30.0)))
    thread.start()
    send_views(left, views)
    thread.join()
    assert found == expected
