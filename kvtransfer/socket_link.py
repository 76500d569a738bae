"""One live link over sockets: a reader (the caller's thread), a writer, and with tcp a reader of the data connection.

`run` returns when the link is over and no thread of it can touch a block any more.
"""

from __future__ import annotations

import logging
import socket
import threading
import time

from ..core.errors import ProtocolError
from ..core.ids import BlockId, Ticket
from ..engine.kv_memory import KVMemory
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
    Renew,
)
from .acceptance import Acceptances, check_push, check_source_slots
from .digest import block_digest
from .effects import AcceptBlocks, BlocksArrived, LinkEffect, MessageArrived, Revoke, Revoked, SendBlocks, SendMessage
from .handshake import Established
from .link import OnEvent
from .outbox import Outbox
from .transports.shm import pull
from .transports.tcp import receive_push, send_push
from .transports.wire import Arrivals, Liveness, read_frame, send_frame

logger = logging.getLogger(__name__)

MAX_QUEUED = 16384  # effects waiting for the writer; a peer that lets so many pile up is as good as gone
_FOR_THE_TABLES = Offer | Grant | Done | Failed | Ack | Cancel | Renew


class SocketLink:
    """A link to one incarnation of one worker. `perform` and `stop` may be called from any thread."""

    def __init__(
        self, established: Established, memory: KVMemory, on_event: OnEvent, liveness_s: float, ping_s: float
    ) -> None:
        self.peer, self.transport = established.peer, established.transport
        self.over = threading.Event()  # set by the owner when PeerLost has been reported
        self._established, self._memory, self._on_event = established, memory, on_event
        self._liveness, self._ping_s, self._ping_at = Liveness(liveness_s), ping_s, time.monotonic()
        self._acceptances = Acceptances(memory.num_layers)
        self._outbox = Outbox(MAX_QUEUED)
        self._lock = threading.Lock()
        self._why = ""

    @property
    def why(self) -> str:
        """Why the link ended: the first reason given."""
        return self._why

    @property
    def refused_pushes(self) -> int:
        return self._acceptances.refused

    # ---- from any thread ----

    def perform(self, effect: LinkEffect) -> None:
        match effect:
            case SendMessage():
                self._put(effect.message)
            case SendBlocks():
                self._put(effect)
            case AcceptBlocks():
                self._acceptances.accept(effect.ticket, effect.generation, effect.blocks)
            case Revoke():
                if self._acceptances.revoke(effect.ticket):
                    self._on_event(Revoked(self.peer, effect.ticket))

    def stop(self, why: str) -> None:
        """End the link soon; `run` returns. The first reason stays."""
        with self._lock:
            self._why = self._why or why
        self._outbox.close()
        for sock in (self._established.control, self._established.data):
            if sock is not None:
                shut(sock)

    # ---- the reader ----

    def run(self) -> None:
        """Read until the link ends, for whatever reason; then wait for the other threads and close everything."""
        threads = [threading.Thread(target=self._write, name=f"kv-write-{self.peer}")]
        if self._established.data is not None:
            data = self._established.data
            threads.append(threading.Thread(target=self._read_blocks, args=(data,), name=f"kv-data-{self.peer}"))
        for thread in threads:
            thread.start()
        try:
            self._read()
        except (OSError, ProtocolError) as err:
            self.stop(str(err))
        finally:
            self.stop("the reader ended")
            for thread in threads:
                thread.join()
            self._established.close()

    def _read(self) -> None:
        while True:
            message = read_frame(self._established.control, self._liveness)
            match message:
                case KvPing():
                    continue
                case Push():
                    self._on_pull(message)
                case Offer() | Grant() | Done() | Failed() | Ack() | Cancel() | Renew():
                    self._on_event(MessageArrived(self.peer, message))
                case _:
                    raise ProtocolError(f"{type(message).__name__} on a link that is up")

    def _on_pull(self, push: Push) -> None:
        """shm: the blocks lie ready in the peer's pool."""
        pool = self._established.pool
        if pool is None:
            raise ProtocolError(f"a push on the control connection of a {self.transport} link without a pool")
        check_push(push, self._memory.num_blocks, self._memory.num_layers)
        check_source_slots(push, pool.num_blocks)
        blocks = self._acceptances.claim(push)
        if blocks is not None:
            pull(pool, self._memory, push, blocks, self._acceptances)
            self._finish(push, blocks)

    # ---- the reader of the data connection (tcp) ----

    def _read_blocks(self, data: socket.socket) -> None:
        arrivals = Arrivals(self._liveness)
        try:
            while True:
                push = read_frame(data, arrivals)
                if not isinstance(push, Push):
                    raise ProtocolError(f"{type(push).__name__} on a data connection")
                check_push(push, self._memory.num_blocks, self._memory.num_layers)
                blocks = self._acceptances.claim(push)
                receive_push(data, self._memory, push, blocks, self._acceptances, arrivals)
                if blocks is not None:
                    self._finish(push, blocks)
        except (OSError, ProtocolError) as err:
            self.stop(f"data connection: {err}")
        finally:
            self.stop("the data reader ended")

    def _finish(self, push: Push, blocks: list[BlockId]) -> None:
        """Check the copies that are now in our own blocks, and report."""
        corrupt = tuple(
            ordinal for ordinal, good in zip(push.ordinals, self._verify(push, blocks), strict=True) if not good
        )
        outcome, ticket = self._acceptances.finish(push), Ticket(push.ticket)
        if outcome.revoked:
            self._on_event(Revoked(self.peer, ticket))
        elif outcome.arrived or corrupt:
            arrived = tuple(ordinal for ordinal in outcome.arrived if ordinal not in corrupt)
            self._on_event(BlocksArrived(self.peer, ticket, push.generation, arrived, corrupt))

    def _verify(self, push: Push, blocks: list[BlockId]) -> list[bool]:
        layers = (push.first_layer, push.num_layers)
        digests = [block_digest(self._memory.block(block, *layers)) for block in blocks]
        return [mine == theirs for mine, theirs in zip(digests, push.digests, strict=True)]

    # ---- the writer ----

    def _put(self, item: HandoffMessage | SendBlocks) -> None:
        if not self._outbox.put(item):
            self.stop(f"{MAX_QUEUED} messages wait for a peer that does not read")

    def _write(self) -> None:
        try:
            while not self._outbox.closed:
                item = self._outbox.take(max(0.0, self._ping_at - time.monotonic()))
                self._ping_when_due()
                if isinstance(item, SendBlocks):
                    self._send_blocks(item)
                elif item is not None:
                    send_frame(self._established.control, item)
        except OSError as err:
            self.stop(f"sending failed: {err}")
        finally:
            self.stop("the writer ended")

    def _ping_when_due(self) -> None:
        if time.monotonic() >= self._ping_at:
            self._ping_at = time.monotonic() + self._ping_s
            send_frame(self._established.control, KvPing())

    def _send_blocks(self, effect: SendBlocks) -> None:
        data = self._established.data
        push = Push(
            ticket=effect.ticket,
            generation=effect.generation,
            first_layer=0,
            num_layers=self._memory.num_layers,
            ordinals=list(effect.ordinals),
            digests=[block_digest(self._memory.block(block_id)) for block_id in effect.block_ids],
            source_slots=list(effect.block_ids) if data is None else [],
        )
        if data is None:
            send_frame(self._established.control, push)
        else:
            send_push(data, self._memory, push, effect.block_ids, self._ping_when_due)


def shut(sock: socket.socket) -> None:
    """Wake whoever reads or writes `sock`; it is closed by its owner."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed or was never connected: nothing can wait on it
