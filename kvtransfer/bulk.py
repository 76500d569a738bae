"""The seam between a hand-off link and what moves the bytes: `Transport` (one per worker) makes a `Bulk` per link.

    register once      Transport(memory); `offer` is what the peer needs to know of it, opaque, exchanged in KvHello
    connect            both ends, at the same time, once they have agreed on this transport
    for each push      source: `send(spans)`      destination: `receive(source, target, wanted)`, or `discard(source)`
    end                `stop` from any thread, then `close` when no thread is in `send` or `receive`

Which bytes move, and where to, is agreed on the control connection before a `Bulk` is asked; it never sees a message.
Both ends name the pushes of one direction in the same order. Whether a peer lives is not its business either: the link
calls `stop` when it is gone, and from then on every call must end soon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..core.errors import ProtocolError, TransferFailed
from ..core.ids import WorkerKey

MAX_OFFER_BYTES = 32 << 10


class Unusable(TransferFailed):
    """This transport cannot serve here or with this peer; the text says why and what would help."""


class NotTheirs(ProtocolError):
    """The source's bytes of this push are another worker's by now: its hand-off was withdrawn. Others go on."""


class Span(NamedTuple):
    """Bytes [offset, offset + nbytes) of a worker's KV memory (`engine.kv_memory`)."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """What both ends know when they connect. `session`: 16 bytes, the same at both ends and of this link alone."""

    me: WorkerKey
    peer: WorkerKey
    session: bytes
    is_dialer: bool
    peer_bytes: int  # size of the peer's KV memory, staging included
    timeout_s: float


class Bulk(Protocol):
    """Moves bytes over one link. One thread calls `send`, another `receive` and `discard`; neither ever calls both.

    Everything may raise OSError or TransferFailed, which ends the link. `quarantine_s`: how long after `close` a write
    into our own memory may still land (one-sided hardware); 0 when none can. `in_parts`: a push may be received in
    several calls, each part checked while it is warm in the processor's caches.
    """

    quarantine_s: float
    in_parts: bool

    def send(self, spans: Sequence[Span]) -> None:
        """Source: let these bytes of our memory reach the peer, which receives the same number of bytes.

        Nothing to do for a transport whose destination reads by itself. The bytes may change afterwards only when the
        destination has said so on the control connection.
        """
        ...

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> bytes | None:
        """Destination: on return the `source` bytes of the peer lie in `target`, in order; both have the same total.

        Asks `wanted` between pieces of at most a few MiB: when it says no, nothing more is written and it returns.
        Returns the digests of all spans when it took them on the way, else None.
        """
        ...

    def discard(self, source: Sequence[Span]) -> None:
        """Destination: these bytes are not wanted; a stream takes them off, a reader does nothing."""
        ...

    def stop(self) -> None:
        """From any thread, any number of times: calls in progress end soon, later ones fail."""
        ...

    def close(self) -> None:
        """Give everything of this link back: registrations, descriptors, threads. Idempotent."""
        ...


class Transport(Protocol):
    """One way to move bytes, for one worker. The memory given at its making outlives it."""

    name: str

    def offer(self) -> bytes:
        """What a peer needs in order to `connect`; at most MAX_OFFER_BYTES."""
        ...

    def connect(self, facts: LinkFacts, peer_offer: bytes) -> Bulk:
        """This end of a new link, within `facts.timeout_s`. Raises Unusable, OSError or TransferFailed."""
        ...

    def close(self) -> None:
        """After all links: forget the memory. Idempotent."""
        ...
