"""UCX through ucxx: tagged messages between two workers, in pieces that both ends cut alike.

open      start a UCX worker on a thread of its own; its address is the offer
connect   an endpoint to the peer's address, and a few bytes each way, so that a link is up only if it works
send      a message for each piece; above 8 KiB UCX moves it only when the peer has asked for it, so nothing piles up
stop      abort the endpoint: what is posted fails
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Annotated

import msgspec
import numpy as np

from ...core.errors import TransferFailed
from ...core.ids import WorkerKey
from ...engine.kv_memory import KVMemory
from ..bulk import Bulk, LinkFacts, Span, Transport, Unusable
from .library import decode_offer, encode_offer
from .pieces import Pieces
from .runs import total_bytes
from .ucx_loop import UcxLoop

_HELLO = np.frombuffer(b"penstock", np.uint8)


class UcxOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    address: Annotated[bytes, msgspec.Meta(min_length=1, max_length=24 << 10)]


class UcxTransport(Transport):
    name = "ucx"

    def __init__(self, memory: KVMemory, me: WorkerKey) -> None:
        """Raises Unusable where ucxx is missing, or for memory on a GPU."""
        if memory.device is not None:
            raise Unusable("ucx moves host memory here; name nixl for memory on a GPU")
        self._memory, self._loop = memory, UcxLoop()

    def offer(self) -> bytes:
        return encode_offer(UcxOffer(self._loop.address))

    def connect(self, facts: LinkFacts, peer_offer: bytes) -> Bulk:
        until = time.monotonic() + facts.timeout_s
        endpoint = self._loop.connect(decode_offer(peer_offer, UcxOffer, facts).address)
        bulk = UcxBulk(self._memory, self._loop, endpoint, facts)
        try:
            bulk.greet(max(0.0, until - time.monotonic()))
        except TransferFailed:
            bulk.close()
            raise
        return bulk

    def close(self) -> None:
        self._loop.close()


class UcxBulk(Bulk):
    """Made by `UcxTransport.connect`."""

    quarantine_s = 0.0  # an aborted endpoint takes no more bytes
    in_parts = False

    def __init__(self, memory: KVMemory, loop: UcxLoop, endpoint: int, facts: LinkFacts) -> None:
        self._loop, self._endpoint = loop, endpoint
        self._outgoing, self._incoming = Pieces(memory.region), Pieces(memory.region)
        ours, theirs = (b"dialer", b"listener") if facts.is_dialer else (b"listener", b"dialer")
        self._send_tag = _tags(facts.session, ours)
        self._receive_tag = _tags(facts.session, theirs)
        self._stopped, self._closed = threading.Event(), False

    def greet(self, timeout_s: float) -> None:
        """Exchange a few bytes with the peer."""
        heard = np.zeros_like(_HELLO)
        operations = (
            self._loop.receive(self._endpoint, heard, self._receive_tag()),
            self._loop.send(self._endpoint, _HELLO, self._send_tag()),
        )
        for operation in operations:
            operation.wait(timeout_s)
        if not np.array_equal(heard, _HELLO):
            raise TransferFailed("the peer greets with other bytes")

    def send(self, spans: Sequence[Span]) -> None:
        for piece in self._outgoing.cut(spans):
            self._check()
            self._loop.send(self._endpoint, self._outgoing.to_send(piece), self._send_tag()).wait()

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> None:
        left = total_bytes(source)
        for piece in self._incoming.cut(target):
            if not wanted():
                self._drain(left)
                return
            self._check()
            view = self._incoming.to_fill(piece)
            self._loop.receive(self._endpoint, view, self._receive_tag()).wait()
            self._incoming.place(piece, view)
            left -= len(view)

    def discard(self, source: Sequence[Span]) -> None:
        self._drain(total_bytes(source))

    def stop(self) -> None:
        self._stopped.set()
        self._loop.abort(self._endpoint)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stopped.set()
            self._loop.settle(self._endpoint)
            self._outgoing.close()
            self._incoming.close()

    def _check(self) -> None:
        if self._stopped.is_set():
            raise TransferFailed("the link is over")

    def _drain(self, nbytes: int) -> None:
        """Take a message for each piece off the stream."""
        for length in self._incoming.lengths(nbytes):
            self._check()
            self._loop.receive(self._endpoint, self._incoming.scratch(length), self._receive_tag()).wait()


def _tags(session: bytes, direction: bytes) -> Callable[[], int]:
    """64-bit tags that this link alone uses, a new one for each message of this direction."""
    numbers = count()

    def following() -> int:
        data = direction + next(numbers).to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(data, key=session, digest_size=8).digest(), "little")

    return following
