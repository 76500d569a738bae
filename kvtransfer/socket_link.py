"""One live link. The control connection has a reader (the caller's thread) and a writer; bytes have two of their own:

    reader     messages → events; announced pushes → receiver        its silence or end is the peer's end
    writer     messages, pings, and the renewal of tickets that live here, whatever the worker's loop does
    sender     blocks → digests → Push → bytes                       (push_sender.py)
    receiver   Push → bytes → digests → BlocksArrived                (push_receiver.py)

`run` returns when the link is over and no thread of it can touch a block any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from ..core.errors import ProtocolError, TransferFailed
from ..core.ids import Ticket
from ..protocol.messages import (
    Ack,
    Cancel,
    Done,
    Failed,
    Grant,
    HandoffMessage,
    KvPing,
    Offer,
    Push,
    Reached,
    Renew,
    Taken,
)
from .bulk import Unusable
from .conversion import Decoder, Encoder, WireCodec
from .digest import digests, no_digests
from .effects import (
    AcceptBlocks,
    LinkEffect,
    MessageArrived,
    Renewing,
    Revoke,
    Revoked,
    SendBlocks,
    SendMessage,
    Withdraw,
)
from .handshake import Established
from .identity import Identity
from .link import OnEvent
from .linking import DESTINATION_ROLES, SOURCE_ROLES
from .outbox import Outbox
from .push_receiver import PushReceiver
from .push_sender import PushSender
from .transports.owner import OwnerBulk
from .transports.wire import Liveness, read_frame, send_frame, shut

logger = logging.getLogger(__name__)

MAX_RENEWED = 65536  # tickets in one Renew, its bound
MAX_QUEUED = 16384  # messages waiting for the writer; a peer that lets so many pile up is as good as gone


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """`liveness_s`: silence that ends a link. `is_stalled`: the worker's loop hangs, so its tickets are not renewed."""

    liveness_s: float = 1.2
    ping_s: float = 0.3
    renew_s: float = 1.0
    is_stalled: Callable[[], bool] = lambda: False


class SocketLink:
    """A link to one incarnation of one worker. `perform` and `stop` may be called from any thread."""

    def __init__(self, established: Established, me: Identity, on_event: OnEvent, times: LinkTimes) -> None:
        assert established.bulk is not None
        self.peer, self.transport = established.peer, established.transport
        self.over = threading.Event()  # set by the owner when PeerLost has been reported
        self._established, self._bulk, self._on_event, self._times = established, established.bulk, on_event, times
        self._control, self._session = established.control, established.session
        self._liveness = Liveness(times.liveness_s)
        self._ping_at = time.monotonic()
        self._renew_at = self._ping_at + times.renew_s
        self._alive: dict[Ticket, None] = {}
        self._outbox: Outbox[HandoffMessage] = Outbox(MAX_QUEUED)
        encoder, decoder = _converters(established, me)
        digests_at = digests if me.digests else no_digests
        self._sender = PushSender(me.memory, self._bulk, encoder, self._send, digests_at)
        self._receiver = PushReceiver(
            self.peer,
            established.hello,
            me.memory,
            self._bulk,
            decoder,
            on_event,
            self._put,
            digests_at,
            self._bulk.is_given if isinstance(self._bulk, OwnerBulk) else None,
        )
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._why = ""

    @property
    def why(self) -> str:
        """Why the link ended: the first reason given."""
        return self._why

    @property
    def refused_pushes(self) -> int:
        return self._receiver.acceptances.refused

    # ---- from any thread ----

    def perform(self, effect: LinkEffect) -> None:
        match effect:
            case SendMessage(message=Done() as done):
                self._queue(done)
            case SendMessage():
                self._put(effect.message)
            case SendBlocks():
                self._queue(effect)
            case Withdraw():
                self._sender.withdraw(effect)
            case Renewing(ticket=ticket, is_alive=is_alive):
                self._note_alive(ticket, is_alive)
            case AcceptBlocks():
                self._receiver.acceptances.accept(effect)
            case Revoke():
                if self._receiver.acceptances.revoke(effect.ticket):
                    self._on_event(Revoked(self.peer, effect.ticket))

    def stop(self, why: str) -> None:
        """End the link soon; `run` returns. The first reason stays."""
        with self._lock:
            self._why = self._why or why
        self._outbox.close()
        self._sender.stop()
        self._receiver.stop()
        shut(self._control)
        self._bulk.stop()

    # ---- threads ----

    def run(self) -> None:
        """Read until the link ends, for whatever reason; then wait for the other threads and close everything."""
        works = {"write": self._write, "send": self._sender.run, "receive": self._receiver.run}
        threads = [
            threading.Thread(target=self._guard, args=(name, work), name=f"kv-{name}-{self.peer}")
            for name, work in works.items()
        ]
        for thread in threads:
            thread.start()
        try:
            self._guard("read", self._read)
        finally:
            for thread in threads:
                thread.join()
            self._established.close()
            self._sender.close()
            self._receiver.close()
            # One-sided hardware may still write for a moment into blocks that were granted on this link.
            time.sleep(self._bulk.quarantine_s)

    def _guard(self, name: str, work: Callable[[], None]) -> None:
        """Run one of the four loops; whichever ends takes the link with it."""
        try:
            work()
        except (OSError, ProtocolError, TransferFailed) as err:
            self.stop(f"{name}: {err}")
        except Exception:  # a library may raise anything, and no error of one link may end the worker
            logger.exception("the %s thread of the hand-off link to %s broke", name, self.peer)
            self.stop(f"{name}: an unexpected error; the log has it")
        finally:
            self.stop(f"the {name} loop ended")

    def _read(self) -> None:
        while True:
            message = read_frame(self._control, self._liveness, self._session)
            match message:
                case KvPing():
                    continue
                case Push():
                    self._receiver.put(message)
                case Taken():
                    self._sender.taken()
                case Offer() | Reached() | Grant() | Done() | Failed() | Ack() | Cancel() | Renew():
                    self._on_event(MessageArrived(self.peer, message))
                case _:
                    raise ProtocolError(f"{type(message).__name__} on a link that is up")

    def _write(self) -> None:
        while not self._outbox.closed:
            due = min(self._ping_at, self._renew_at)
            message = self._outbox.take(max(0.0, due - time.monotonic()))
            if message is not None:
                self._send(message)
            self._say_alive()

    def _say_alive(self) -> None:
        now = time.monotonic()
        if now >= self._ping_at:
            self._ping_at = now + self._times.ping_s
            self._send(KvPing())
        if now >= self._renew_at:
            self._renew_at = now + self._times.renew_s
            tickets = self._tickets()
            if tickets and not self._times.is_stalled():
                self._send(Renew(tickets=tickets))

    def _send(self, message: HandoffMessage) -> None:
        """Now, from the writer, or from the sender: a push that waited for another thread would leave the peer idle."""
        with self._sending:
            send_frame(self._control, message, self._session)

    # ---- small things ----

    def _tickets(self) -> list[bytes]:
        with self._lock:
            tickets: list[bytes] = [*islice(self._alive, MAX_RENEWED)]
            return tickets

    def _note_alive(self, ticket: Ticket, is_alive: bool) -> None:
        with self._lock:
            if is_alive:
                self._alive[ticket] = None
            else:
                self._alive.pop(ticket, None)

    def _put(self, message: HandoffMessage) -> None:
        if not self._outbox.put(message):
            self.stop(f"{MAX_QUEUED} messages wait for a peer that does not read")

    def _queue(self, item: SendBlocks | Done) -> None:
        if not self._sender.put(item):
            self.stop("too many blocks wait for a peer that does not take them")


def _converters(established: Established, me: Identity) -> tuple[Encoder | None, Decoder | None]:
    """What this end needs when blocks do not travel as they are. Raises Unusable without staging memory for it."""
    wire_dtype, theirs = established.wire_dtype, established.hello.fingerprint
    encoder: Encoder | None = None
    decoder: Decoder | None = None
    if wire_dtype and me.role in SOURCE_ROLES:
        encoder = Encoder(WireCodec(me.memory, me.fingerprint, me.fingerprint, wire_dtype), me.staging)
    if wire_dtype and me.role in DESTINATION_ROLES:
        try:
            decoder = Decoder(WireCodec(me.memory, me.fingerprint, theirs, wire_dtype), me.staging, established.hello)
        except Unusable:
            if encoder is not None:
                encoder.close()
            raise
    return encoder, decoder
