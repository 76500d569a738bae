"""The one module that knows ZeroMQ: a ROUTER socket for the router, a DEALER for each worker, loopback or ipc only.

Frames are opaque bytes here; `codec` gives them meaning. Both sockets bound what they hold: at the high-water mark a
send drops and counts, and a frame over MAX_FRAME_BYTES ends its connection. A worker's identity is "worker_id@epoch",
so two incarnations never share a route.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import os
import stat
from dataclasses import dataclass

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from ..core.errors import ConfigError
from ..core.ids import WorkerKey
from .codec import MAX_FRAME_BYTES

HIGH_WATER_MARK = 8192  # frames for each peer and direction
MAX_PIDS = 8192  # peers whose process is remembered
MAX_IDENTITY_BYTES = 255
MAX_IPC_PATH_BYTES = 107  # of sockaddr_un


@dataclass(slots=True)
class SocketCounters:
    received: int = 0
    sent: int = 0
    bad_frames: int = 0  # wrong shape; the connection goes on
    dropped_full: int = 0  # the peer reads too slowly
    dropped_unreachable: int = 0  # no such peer now


def identity_of(worker: WorkerKey) -> str:
    return f"{worker.worker_id}@{worker.epoch}"


def check_address(address: str) -> str:
    """`address` when nothing outside this machine can reach it; raises ConfigError otherwise."""
    scheme, _, rest = address.partition("://")
    if scheme == "ipc" and rest and not rest.startswith("@"):
        size = len(os.fsencode(rest))
        if size > MAX_IPC_PATH_BYTES:
            raise ConfigError(f"address {address!r}: a path of {size} bytes, a Unix socket allows {MAX_IPC_PATH_BYTES}")
        return address
    if scheme == "tcp" and _is_loopback(rest.rpartition(":")[0]):
        return address
    if scheme == "tcp":
        raise ConfigError(
            f"address {address!r} is not loopback: a socket that other machines reach needs keys, "
            "which are not set up; use ipc://PATH or tcp://127.0.0.1:PORT"
        )
    raise ConfigError(f"address {address!r}: use ipc://PATH or tcp://127.0.0.1:PORT")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _limit(socket: zmq.Socket[bytes] | zmq.asyncio.Socket, high_water_mark: int) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, high_water_mark)
    socket.setsockopt(zmq.RCVHWM, high_water_mark)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)


def _peer_pid(frame: zmq.Frame) -> int | None:
    """libzmq notes the credentials of a Unix socket's peer as `…:uid:gid:pid`; 0 is a process we cannot see."""
    try:
        pid = str(frame.get("Peer-Address")).rpartition(":")[2]
    except (zmq.ZMQError, UnicodeDecodeError):
        return None
    return int(pid) if pid.isascii() and pid.isdigit() and int(pid) > 0 else None


class RouterSocket:
    """The router's end. One asyncio loop owns it."""

    def __init__(self, address: str, high_water_mark: int = HIGH_WATER_MARK) -> None:
        check_address(address)
        self.counters = SocketCounters()
        self._pids: dict[bytes, int | None] = {}  # peer → its process
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            _limit(self._socket, high_water_mark)
            self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
            # With this a full or absent peer is an error to count, not a silent drop; nothing ever waits.
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._socket.bind(address)
        except zmq.ZMQError as err:
            self.close()
            raise ConfigError(f"address {address!r}: cannot listen there: {err.strerror}") from err
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        if address.startswith("ipc://"):
            os.chmod(address.removeprefix("ipc://"), stat.S_IRUSR | stat.S_IWUSR)

    async def recv(self) -> tuple[bytes, bytes]:
        """The next (identity, frame)."""
        while True:
            parts = await self._socket.recv_multipart(copy=False)
            if len(parts) == 2:
                self.counters.received += 1
                identity = parts[0].bytes
                if identity not in self._pids:
                    self._note_pid(identity, parts[1])
                return identity, parts[1].bytes
            self.counters.bad_frames += 1

    def pid_of(self, identity: bytes) -> int | None:
        """The process at the other end of a Unix socket, by the word of the kernel; None where it cannot say."""
        return self._pids.get(identity)

    def _note_pid(self, identity: bytes, frame: zmq.Frame) -> None:
        while len(self._pids) >= MAX_PIDS:
            del self._pids[next(iter(self._pids))]
        self._pids[identity] = _peer_pid(frame) if self.address.startswith("ipc://") else None

    def send(self, identity: bytes, frame: bytes) -> bool:
        """Queue `frame` for a peer without waiting; False when it was dropped."""
        sending = self._socket.send_multipart((identity, frame), flags=zmq.NOBLOCK)
        # A send that does not wait is over when the call returns; its future only carries the outcome.
        error = sending.exception() if isinstance(sending, asyncio.Future) else None
        if error is None:
            self.counters.sent += 1
            return True
        if isinstance(error, zmq.Again):
            self.counters.dropped_full += 1
        elif isinstance(error, zmq.ZMQError) and error.errno == zmq.EHOSTUNREACH:
            self.counters.dropped_unreachable += 1
        else:
            raise error
        return False

    def close(self) -> None:
        """Safe twice. What is queued is dropped."""
        self._socket.close()
        self._context.term()


class WorkerSocket:
    """A worker's end. One thread owns it; only `wake` may be called from others."""

    def __init__(self, address: str, identity: str, high_water_mark: int = HIGH_WATER_MARK) -> None:
        check_address(address)
        name = identity.encode()
        if not 0 < len(name) <= MAX_IDENTITY_BYTES:
            raise ConfigError(f"worker identity {identity!r}: {len(name)} bytes, the bound is {MAX_IDENTITY_BYTES}")
        self.counters = SocketCounters()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._is_closed = False
        _limit(self._socket, high_water_mark)
        self._socket.setsockopt(zmq.IDENTITY, name)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._is_connected = False
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_reader, zmq.POLLIN)

    def poll(self, timeout_s: float) -> bool:
        """Wait for a frame, a `wake` or the time; whether a frame is there."""
        events = dict(self._poller.poll(max(0, math.ceil(timeout_s * 1000))))
        if self._wake_reader in events:
            os.read(self._wake_reader, 65536)
        return self._socket in events

    @property
    def is_connected(self) -> bool:
        """The other end has an open socket. It may still be one whose process sleeps."""
        while self._monitor.poll(0):
            self._is_connected = recv_monitor_message(self._monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        return self._is_connected

    def wake(self) -> None:
        """End a `poll` now or the next one at once. Any thread, any time."""
        if self._is_closed:
            return
        try:
            os.write(self._wake_writer, b"w")
        except BlockingIOError:
            return  # a full pipe wakes too

    def recv(self) -> bytes | None:
        """The next frame, None when there is none."""
        while True:
            try:
                parts = self._socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(parts) == 1:
                self.counters.received += 1
                return parts[0]
            self.counters.bad_frames += 1

    def send(self, frame: bytes) -> bool:
        """Queue `frame` without waiting; False when it was dropped."""
        try:
            self._socket.send(frame, flags=zmq.NOBLOCK)
        except zmq.Again:
            self.counters.dropped_full += 1
            return False
        self.counters.sent += 1
        return True

    def close(self) -> None:
        """Give what is queued a moment to leave, then drop it. Safe twice."""
        if self._is_closed:
            return
        self._is_closed = True
        # Goodbye is the last frame: with linger 0 it would be dropped before the I/O thread has it.
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=200)
        self._context.term()
        os.close(self._wake_reader)
        os.close(self._wake_writer)
