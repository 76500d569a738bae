"""How two workers become a link, before any hand-off message or byte of a block moves.

    dialer (decode)                                       listener (prefill)
    KvHello: who I am, whom I expect, fingerprint,   →
             transports I allow, descriptor, offers       objection? KvRefuse, else
                                                     ←    KvHello: the one transport, descriptor or token; KvProof
    KvProof                                          →    a wrong key? KvRefuse
    the bulk connection is made: tcp, a library, or nothing for a mapped pool
    Measure …                                        →    bytes, a few times
    KvReady: what travels on this link               →
    link is up                                       ←    KvReady: link is up

A side that can be a source passes its pool's descriptor when shm is possible. KvRefuse ends all tries for this epoch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from ..core.errors import ProtocolError, TransferFailed
from ..core.ids import IdSource, SecureIds, WorkerKey
from ..protocol.codec import handoff
from ..protocol.messages import HandoffMessage, KvHello, KvProof, KvReady, KvRefuse, Measure, Peer
from .bulk import Bulk, LinkFacts, Unusable
from .data_connection import deliver, open_data
from .figures import MEASURED_BYTES, NO_FIGURES, LinkFigures, answer_measure, can_measure, measure
from .identity import Identity, region_bytes, same_user
from .linking import SOURCE_ROLES
from .session import Session
from .transports.address import KvAddress
from .transports.owner import NAME as OWNER
from .transports.owner import OwnerTransport
from .transports.shm import MappedPool, ShmBulk
from .transports.tcp import Rendezvous, TcpBulk, tune
from .transports.wire import MAX_HELLO_BYTES, Deadline, read_body, read_frame, read_header_and_fd, send_frame
from .wire_format import check_wire_dtype, negotiate
from .wording import safe_text

_IDS: IdSource = SecureIds()
M = TypeVar("M", KvProof, KvReady)


class Refused(TransferFailed):
    """The two workers do not fit; trying again with these incarnations changes nothing."""


class ShmUnusable(TransferFailed):
    """Shared memory was agreed on and does not work here."""


@dataclass(slots=True)
class Established:
    """An open link. Whoever holds it closes it. `wire_dtype`: empty when blocks travel as they are."""

    peer: WorkerKey
    hello: KvHello
    transport: str
    reason: str
    control: socket.socket
    session: Session
    bulk: Bulk | None = None
    wire_dtype: str = ""
    figures: LinkFigures = NO_FIGURES

    def close(self) -> None:
        self.control.close()
        if self.bulk is not None:
            self.bulk.stop()
            self.bulk.close()


@dataclass(slots=True)
class _Received:
    """A hello and the descriptor that came with it, which `close` or `map_pool` takes care of."""

    hello: KvHello
    fd: int | None = None

    def close(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def map_pool(self) -> MappedPool | None:
        fd, self.fd = self.fd, None
        return None if fd is None else MappedPool(fd, region_bytes(self.hello))


# ---- dialer ----


def dial(me: Identity, peer: Peer, timeout_s: float) -> Established:
    """Open a link to `peer`. Raises Refused for good, OSError, ProtocolError or TransferFailed for now."""
    address, why = KvAddress.parse(peer.kv_address), ""
    if "shm" in me.transports:
        try:
            return _agree(_connect_unix(address, timeout_s), me, peer, me.transports, "", timeout_s)
        except ShmUnusable as err:
            if me.transports == ("shm",):
                raise
            why = f"no shared memory: {err}"
    if address.tcp is None:
        raise ProtocolError(f"{peer.worker_id} has no tcp address; {why or 'shm is not allowed here'}")
    control = socket.create_connection(address.tcp, timeout_s)
    others = tuple(name for name in me.transports if name != "shm")
    return _agree(control, me, peer, others, why, timeout_s)


def _connect_unix(address: KvAddress, timeout_s: float) -> socket.socket:
    if address.unix is None:
        raise ShmUnusable("the peer has no Unix socket")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address.unix)
        trusted = same_user(sock)
    except OSError as err:
        sock.close()
        raise ShmUnusable(f"Unix socket {address.unix}: {err}") from err
    if not trusted:
        sock.close()
        raise ShmUnusable(f"Unix socket {address.unix} belongs to another user")
    return sock


def _agree(
    control: socket.socket, me: Identity, peer: Peer, transports: tuple[str, ...], why: str, timeout_s: float
) -> Established:
    """The dialer's half of the handshake on a fresh control connection, which is closed when it fails."""
    with contextlib.ExitStack() as undo:
        undo.callback(control.close)
        control.settimeout(timeout_s)
        tune(control)
        deadline = Deadline(timeout_s)
        mine = me.hello(peer.epoch, transports, _IDS.token(16))
        send_frame(control, mine, fd=me.pool_fd() if "shm" in transports else None)
        received = _receive_hello(control, deadline)
        undo.callback(received.close)
        hello = received.hello
        _refuse_on(control, _objection_to_listener(me, peer, hello, transports))
        session = Session(me.cluster_key, mine, hello, is_dialer=True)
        proof = _expect(control, deadline, KvProof)
        _refuse_on(control, None if session.is_proven(proof.mac) else _key_differs(me, peer.worker_id))
        send_frame(control, KvProof(mac=session.proof))
        key, chosen = WorkerKey(hello.worker_id, hello.epoch), hello.transports[0]
        link = Established(key, hello, chosen, why or _REASONS.get(chosen, "asked for by name"), control, session)
        undo.callback(link.close)
        _open_bulk(link, me, received, deadline, peer)
        _conclude_dialing(link, me, mine, deadline)
        undo.pop_all()
    received.close()
    _settle(link)
    return link


def _conclude_dialing(link: Established, me: Identity, mine: KvHello, deadline: Deadline) -> None:
    """Measure, say what travels, and hear that the listener is ready."""
    assert link.bulk is not None
    if can_measure(mine, link.hello) and link.transport != OWNER:

        def ask(nbytes: int) -> None:
            send_frame(link.control, Measure(nbytes=nbytes), link.session)

        with _stopped_at(deadline, link.bulk):
            link.figures = measure(link.bulk, me.staging, link.hello, ask)
    if link.transport != OWNER:  # on which the formats are one and nothing moves
        link.wire_dtype = negotiate(me.fingerprint, link.hello.fingerprint, me.wire_dtype, link.figures)
    send_frame(link.control, KvReady(wire_dtype=link.wire_dtype), link.session)
    _expect(link.control, deadline, KvReady, link.session)


def _objection_to_listener(me: Identity, peer: Peer, hello: KvHello, transports: tuple[str, ...]) -> str | None:
    if (hello.worker_id, hello.epoch) != (peer.worker_id, peer.epoch):
        return f"expected {WorkerKey(peer.worker_id, peer.epoch)}, met {WorkerKey(hello.worker_id, hello.epoch)}"
    if len(hello.transports) != 1 or hello.transports[0] not in transports:
        return f"transports differs: {hello.transports} chosen, {list(transports)} possible"
    return _difference(me, hello)


def _difference(me: Identity, hello: KvHello) -> str | None:
    if me.digests != hello.digests:
        return f"digests differs: {me.digests} here, {hello.digests} there"
    if (me.tls is not None) != hello.has_tls:
        words = {True: "TLS", False: "none"}
        return f"tls differs: {words[me.tls is not None]} here, {words[hello.has_tls]} there; set it up at both"
    return me.fingerprint.difference(hello.fingerprint)


# ---- listener ----


def answer(control: socket.socket, me: Identity, rendezvous: Rendezvous, timeout_s: float) -> Established | None:
    """The listener's half on a connection just accepted; None when it was a data connection and found its link.

    Raises Refused, OSError or ProtocolError; the connection is closed then.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(control.close)
        control.settimeout(timeout_s)
        tune(control)
        deadline = Deadline(timeout_s)
        received = _receive_hello(control, deadline)
        undo.callback(received.close)
        if received.hello.token:
            deliver(control, me, received.hello.token, rendezvous, deadline.remaining)
            undo.pop_all()
            received.close()
            return None
        _refuse_on(control, _objection_to_dialer(me, received.hello))
        link = _answer_hello(control, me, received, rendezvous, deadline, undo)
        _conclude_answering(link, me, deadline)
        undo.pop_all()
    received.close()
    _settle(link)
    return link


_REASONS = {
    "shm": "same host and user, memory mapped over the Unix socket",
    "tcp": "chosen by the peer",
    OWNER: "both keep their blocks in one memory; a block changes its owner",
}


def _answer_hello(
    control: socket.socket,
    me: Identity,
    received: _Received,
    rendezvous: Rendezvous,
    deadline: Deadline,
    undo: contextlib.ExitStack,
) -> Established:
    """Choose a transport, exchange proofs, and make the bulk connection."""
    hello = received.hello
    chosen, reason = _choose(me, hello, control)
    _refuse_on(control, None if chosen else f"transports differs: no common one; {reason}")
    token = rendezvous.open() if chosen == "tcp" else b""
    undo.callback(rendezvous.forget, token)
    mine = me.hello(None, (chosen,), _IDS.token(16), token)
    session = Session(me.cluster_key, hello, mine, is_dialer=False)
    send_frame(control, mine, fd=me.pool_fd() if chosen == "shm" else None)
    send_frame(control, KvProof(mac=session.proof))
    proof = _expect(control, deadline, KvProof)
    _refuse_on(control, None if session.is_proven(proof.mac) else _key_differs(me, hello.worker_id))
    link = Established(WorkerKey(hello.worker_id, hello.epoch), hello, chosen, reason, control, session)
    undo.callback(link.close)
    if chosen == "tcp":
        data = rendezvous.collect(token, deadline.remaining)
        if data is None:
            raise TimeoutError("the peer opened no data connection")
        link.bulk = TcpBulk(me.memory, data)
    else:
        _open_bulk(link, me, received, deadline, None)
    return link


def _choose(me: Identity, hello: KvHello, control: socket.socket) -> tuple[str, str]:
    """The first of our transports that both allow and that works here, and why; empty when there is none."""
    obstacles: list[str] = []
    for name in me.transports:
        if name not in hello.transports:
            obstacles.append(f"{name} is not allowed, or not reachable, for the peer")
        elif name == "shm" and (obstacle := _shm_obstacle(me, hello, control)):
            obstacles.append(f"no shared memory: {obstacle}")
        elif name == OWNER and (obstacle := _owner_obstacle(me, hello)):
            obstacles.append(f"no change of owner: {obstacle}")
        else:
            return name, "; ".join(obstacles) or _REASONS.get(name, "asked for by name")
    return "", f"{list(me.transports)} here, {hello.transports} there; {'; '.join(obstacles)}"


def _conclude_answering(link: Established, me: Identity, deadline: Deadline) -> None:
    """Send bytes for as long as the dialer measures."""
    assert link.bulk is not None
    while True:
        message = read_frame(link.control, deadline, link.session, MAX_HELLO_BYTES)
        if isinstance(message, Measure) and message.nbytes <= min(MEASURED_BYTES, me.memory.staging_bytes):
            with _stopped_at(deadline, link.bulk):
                answer_measure(link.bulk, me.memory, message.nbytes)
        elif isinstance(message, KvReady):
            check_wire_dtype(me.fingerprint, link.hello.fingerprint, message.wire_dtype)
            link.wire_dtype = message.wire_dtype
            send_frame(link.control, KvReady(), link.session)
            return
        else:
            raise _unexpected(message)


def _shm_obstacle(me: Identity, hello: KvHello, control: socket.socket) -> str | None:
    if not me.host_id or me.host_id != hello.host_id:
        return "another boot id"
    if not same_user(control):
        return "not a Unix socket of the same user"
    if me.role in SOURCE_ROLES and me.pool_fd() is None:
        return "this system has no memfd"
    return None


def _owner_obstacle(me: Identity, hello: KvHello) -> str | None:
    """Why blocks cannot stay where they are on this link; such a link copies, as any other."""
    transport = me.libraries[OWNER]
    assert isinstance(transport, OwnerTransport)
    if not me.fingerprint.is_same_format(hello.fingerprint):
        return "the cache formats differ"
    try:
        transport.peer_number(WorkerKey(hello.worker_id, hello.epoch), hello.offers.get(OWNER, b""))
    except Unusable as err:
        return str(err)
    return None


def _objection_to_dialer(me: Identity, hello: KvHello) -> str | None:
    if hello.peer_epoch != me.key.epoch:
        # Our own epoch stays unsaid: knowing it is what shows that the router introduced us.
        return f"epoch differs: {me.key.worker_id} is not the incarnation {str(hello.peer_epoch)[:6]} that is expected"
    if me.role not in SOURCE_ROLES or hello.worker_id == me.key.worker_id:
        return f"role differs: {me.key.worker_id} is no source for {hello.worker_id}"
    return _difference(me, hello)


# ---- both ----


def _open_bulk(link: Established, me: Identity, received: _Received, deadline: Deadline, peer: Peer | None) -> None:
    """Make what moves the bytes. `peer` is set at the dialer, which opens the data connection of tcp."""
    hello = link.hello
    if link.transport == "shm":
        needed = peer is not None and peer.role in SOURCE_ROLES
        link.bulk = ShmBulk(me.memory, _map_pool(received, needed), me.digests)
    elif link.transport == "tcp":
        assert peer is not None
        link.bulk = TcpBulk(me.memory, open_data(me, peer, hello.token, deadline.remaining, _IDS))
    else:
        facts = LinkFacts(
            me.key, link.peer, link.session.name, peer is not None, region_bytes(hello), deadline.remaining
        )
        link.bulk = me.libraries[link.transport].connect(facts, hello.offers.get(link.transport, b""))


def _key_differs(me: Identity, peer: str) -> str:
    return f"key differs: {me.key.worker_id} and {peer} do not share one cluster key; give both the same key file"


def _receive_hello(control: socket.socket, deadline: Deadline) -> _Received:
    """The peer's hello. Raises Refused when it refuses, ProtocolError for anything else."""
    fd: int | None = None
    if control.family == socket.AF_UNIX:
        header, fd = read_header_and_fd(control, deadline)
        try:
            message = handoff.decode(memoryview(read_body(control, header, deadline, MAX_HELLO_BYTES)))
        except (OSError, ProtocolError):
            _close_fd(fd)
            raise
    else:
        message = read_frame(control, deadline, limit=MAX_HELLO_BYTES)
    if isinstance(message, KvHello):
        return _Received(message, fd)
    _close_fd(fd)
    raise _unexpected(message)


def _expect(control: socket.socket, deadline: Deadline, kind: type[M], session: Session | None = None) -> M:
    message = read_frame(control, deadline, session, MAX_HELLO_BYTES)
    if not isinstance(message, kind):
        raise _unexpected(message)
    return message


def _unexpected(message: HandoffMessage) -> Refused | ProtocolError:
    if isinstance(message, KvRefuse):
        return Refused(f"refused by the peer: {message.reason}")
    return ProtocolError(f"{type(message).__name__} during the handshake")


def _refuse_on(control: socket.socket, objection: str | None) -> None:
    """Tell the peer and raise when there is an objection."""
    if objection is None:
        return
    with contextlib.suppress(OSError):
        send_frame(control, KvRefuse(reason=safe_text(objection)))
    raise Refused(objection)


def _map_pool(received: _Received, needed: bool) -> MappedPool | None:
    try:
        pool = received.map_pool()
    except (OSError, ValueError, ProtocolError) as err:
        raise ShmUnusable(f"mapping the peer's pool failed: {err}") from err
    if pool is None and needed:
        raise ShmUnusable("the peer passed no pool")
    return pool


@contextlib.contextmanager
def _stopped_at(deadline: Deadline, bulk: Bulk) -> Iterator[None]:
    """A peer that falls silent while bytes are measured holds nobody up for longer than any other part may take."""
    timer = threading.Timer(deadline.remaining, bulk.stop)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _settle(link: Established) -> None:
    """From now on reads and writes block; liveness is watched by polling, and shutdown ends them."""
    link.control.settimeout(None)


def _close_fd(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
