"""How two workers become a link, before any hand-off message or byte of a block moves.

    dialer (decode)                                       listener (prefill)
    KvHello: who I am, whom I expect, fingerprint,   →
             transports I allow, descriptor               objection? KvRefuse, else
                                                     ←    KvHello: the one transport, descriptor or token
    tcp: data connection with KvHello(token)         →
    KvPing: I am ready                               →    link is up
    link is up

A side that can be a source passes its pool's descriptor when shm is possible. KvRefuse ends all tries for this epoch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass

from ..core.errors import ProtocolError, TransferFailed
from ..core.ids import WorkerKey
from ..engine.kv_memory import KVMemory
from ..protocol.messages import Fingerprint, HandoffMessage, KvHello, KvPing, KvRefuse, Peer, Role
from .linking import SOURCE_ROLES
from .transports.address import KvAddress
from .transports.shm import MappedPool
from .transports.tcp import Rendezvous, tune
from .transports.wire import MAX_HELLO_BYTES, Deadline, read_body, read_frame, read_header_and_fd, send_frame
from .wording import safe_text


class Refused(TransferFailed):
    """The two workers do not fit; trying again with these incarnations changes nothing."""


class ShmUnusable(TransferFailed):
    """Shared memory was agreed on and does not work here."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What this worker says about itself."""

    key: WorkerKey
    role: Role
    fingerprint: Fingerprint
    transports: tuple[str, ...]
    host_id: str
    memory: KVMemory

    def hello(self, peer_epoch: str | None, transports: tuple[str, ...], token: bytes = b"") -> KvHello:
        return KvHello(
            worker_id=self.key.worker_id,
            epoch=self.key.epoch,
            peer_epoch=peer_epoch,
            fingerprint=self.fingerprint,
            transports=list(transports),
            host_id=self.host_id,
            num_blocks=self.memory.num_blocks,
            token=token,
        )

    def pool_fd(self) -> int | None:
        """The descriptor to pass, when this worker can be a source."""
        return self.memory.fileno() if self.role in SOURCE_ROLES else None


@dataclass(slots=True)
class Established:
    """An open link. Whoever holds it closes it."""

    peer: WorkerKey
    transport: str
    reason: str
    control: socket.socket
    data: socket.socket | None = None
    pool: MappedPool | None = None

    def close(self) -> None:
        self.control.close()
        if self.data is not None:
            self.data.close()
        if self.pool is not None:
            self.pool.close()


@dataclass(slots=True)
class _Received:
    """A hello and the descriptor that came with it, which `close` or `map_pool` takes care of."""

    hello: KvHello
    fd: int | None = None

    def close(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def map_pool(self, block_bytes: int) -> MappedPool | None:
        fd, self.fd = self.fd, None
        return None if fd is None else MappedPool(fd, self.hello.num_blocks, block_bytes)


def boot_id() -> str:
    """Names this boot of this machine; empty where the system does not say, which equals nothing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end of this Unix socket belongs to this user."""
    if sock.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return False
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid) == os.getuid()


# ---- dialer ----


def dial(me: Identity, peer: Peer, timeout_s: float) -> Established:
    """Open a link to `peer`. Raises Refused for good, OSError, ProtocolError or TransferFailed for now."""
    address, why = KvAddress.parse(peer.kv_address), "shm is not allowed here"
    if "shm" in me.transports:
        try:
            return _agree(_connect_unix(address, timeout_s), me, peer, address, me.transports, "", timeout_s)
        except ShmUnusable as err:
            if "tcp" not in me.transports:
                raise
            why = f"no shared memory: {err}"
    if address.tcp is None:
        raise ProtocolError(f"{peer.worker_id} has no tcp address, and {why}")
    control = socket.create_connection(address.tcp, timeout_s)
    return _agree(control, me, peer, address, ("tcp",), why, timeout_s)


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
    control: socket.socket,
    me: Identity,
    peer: Peer,
    address: KvAddress,
    transports: tuple[str, ...],
    why: str,
    timeout_s: float,
) -> Established:
    """The dialer's half of the handshake on a fresh control connection, which is closed when it fails."""
    with contextlib.ExitStack() as undo:
        undo.callback(control.close)
        control.settimeout(timeout_s)
        tune(control)
        deadline = Deadline(timeout_s)
        send_frame(control, me.hello(peer.epoch, transports), me.pool_fd() if "shm" in transports else None)
        received = _receive_hello(control, deadline)
        undo.callback(received.close)
        hello = received.hello
        _refuse_on(control, _objection_to_listener(me, peer, hello, transports))
        key, chosen = WorkerKey(hello.worker_id, hello.epoch), hello.transports[0]
        link = Established(key, chosen, why or _REASONS[chosen], control)
        if chosen == "shm":
            link.pool = _map_pool(received, me, needed=peer.role in SOURCE_ROLES)
            undo.callback(link.close)
        else:
            link.data = _open_data(me, peer, address, hello.token, timeout_s)
            undo.callback(link.data.close)
        send_frame(control, KvPing())
        undo.pop_all()
    _settle(link)
    received.close()
    return link


def _open_data(me: Identity, peer: Peer, address: KvAddress, token: bytes, timeout_s: float) -> socket.socket:
    if address.tcp is None:
        raise ProtocolError(f"{peer.worker_id} has no tcp address")
    data = socket.create_connection(address.tcp, timeout_s)
    try:
        tune(data, bulk=True)
        send_frame(data, me.hello(peer.epoch, ("tcp",), token))
    except OSError:
        data.close()
        raise
    return data


def _objection_to_listener(me: Identity, peer: Peer, hello: KvHello, transports: tuple[str, ...]) -> str | None:
    if (hello.worker_id, hello.epoch) != (peer.worker_id, peer.epoch):
        return f"expected {WorkerKey(peer.worker_id, peer.epoch)}, met {WorkerKey(hello.worker_id, hello.epoch)}"
    if len(hello.transports) != 1 or hello.transports[0] not in transports:
        return f"transports differs: {hello.transports} chosen, {list(transports)} possible"
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
        hello = received.hello
        if hello.token:
            _deliver(control, hello.token, rendezvous)
            undo.pop_all()
            received.close()
            return None
        _refuse_on(control, _objection_to_dialer(me, hello))
        link = _choose(me, received, control)
        undo.callback(link.close)
        _refuse_on(control, None if link.transport else f"transports differs: no common one; {link.reason}")
        if link.transport == "shm":
            send_frame(control, me.hello(None, ("shm",)), me.pool_fd())
            _expect_ready(control, deadline)
        else:
            link.data = _await_data(control, me, rendezvous, deadline)
        undo.pop_all()
    _settle(link)
    received.close()
    return link


_REASONS = {
    "shm": "same host and user, pool mapped over the Unix socket",
    "tcp": "chosen by the peer",
}


def _choose(me: Identity, received: _Received, control: socket.socket) -> Established:
    """The link to be, with transport and reason; an empty transport when there is none."""
    hello = received.hello
    peer = WorkerKey(hello.worker_id, hello.epoch)
    obstacle = _shm_obstacle(me, hello, control)
    if obstacle is None:
        try:
            return Established(peer, "shm", _REASONS["shm"], control, pool=_map_pool(received, me, needed=False))
        except ShmUnusable as err:
            obstacle = str(err)
    if "tcp" in me.transports and "tcp" in hello.transports:
        return Established(peer, "tcp", f"no shared memory: {obstacle}", control)
    return Established(peer, "", f"{list(me.transports)} here, {hello.transports} there, {obstacle}", control)


def _await_data(control: socket.socket, me: Identity, rendezvous: Rendezvous, deadline: Deadline) -> socket.socket:
    """Agree to tcp and wait for the data connection."""
    token = rendezvous.open()
    try:
        send_frame(control, me.hello(None, ("tcp",), token))
        _expect_ready(control, deadline)
        data = rendezvous.collect(token, deadline.remaining)
    finally:
        rendezvous.forget(token)
    if data is None:
        raise TimeoutError("the peer opened no data connection")
    return data


def _shm_obstacle(me: Identity, hello: KvHello, control: socket.socket) -> str | None:
    if "shm" not in me.transports or "shm" not in hello.transports:
        return "not allowed, or not reachable for the peer"
    if not me.host_id or me.host_id != hello.host_id:
        return "another boot id"
    if not same_user(control):
        return "not a Unix socket of the same user"
    if me.role in SOURCE_ROLES and me.pool_fd() is None:
        return "this system has no memfd"
    return None


def _objection_to_dialer(me: Identity, hello: KvHello) -> str | None:
    if hello.peer_epoch != me.key.epoch:
        # Our own epoch stays unsaid: knowing it is what shows that the router introduced us.
        return f"epoch differs: {me.key.worker_id} is not the incarnation {str(hello.peer_epoch)[:6]} that is expected"
    if me.role not in SOURCE_ROLES or hello.worker_id == me.key.worker_id:
        return f"role differs: {me.key.worker_id} is no source for {hello.worker_id}"
    return me.fingerprint.difference(hello.fingerprint)


def _deliver(data: socket.socket, token: bytes, rendezvous: Rendezvous) -> None:
    tune(data, bulk=True)
    if not rendezvous.deliver(token, data):
        raise ProtocolError("a data connection with an unknown token")


# ---- both ----


def _receive_hello(control: socket.socket, deadline: Deadline) -> _Received:
    """The peer's hello. Raises Refused when it refuses, ProtocolError for anything else."""
    fd: int | None = None
    if control.family == socket.AF_UNIX:
        header, fd = read_header_and_fd(control, deadline)
        try:
            message = read_body(control, header, deadline, MAX_HELLO_BYTES)
        except (OSError, ProtocolError):
            _close_fd(fd)
            raise
    else:
        message = read_frame(control, deadline, MAX_HELLO_BYTES)
    if isinstance(message, KvHello):
        return _Received(message, fd)
    _close_fd(fd)
    raise _unexpected(message)


def _expect_ready(control: socket.socket, deadline: Deadline) -> None:
    message = read_frame(control, deadline, MAX_HELLO_BYTES)
    if not isinstance(message, KvPing):
        raise _unexpected(message)


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


def _map_pool(received: _Received, me: Identity, needed: bool) -> MappedPool | None:
    try:
        pool = received.map_pool(me.memory.block_bytes)
    except (OSError, ValueError, ProtocolError) as err:
        raise ShmUnusable(f"mapping the peer's pool failed: {err}") from err
    if pool is None and needed:
        raise ShmUnusable("the peer passed no pool")
    return pool


def _settle(link: Established) -> None:
    """From now on reads and writes block; liveness is watched by polling, and shutdown ends them."""
    link.control.settimeout(None)
    if link.data is not None:
        link.data.settimeout(None)


def _close_fd(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
