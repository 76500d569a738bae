"""Frames on a stream socket: 4 bytes of length, then one message. The bound is checked before anything is allocated."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

from ...core.errors import ProtocolError
from ...protocol.codec import handoff
from ...protocol.messages import HandoffMessage
from ..session import Session

MAX_FRAME_BYTES = 4 << 20
MAX_HELLO_BYTES = 128 << 10
_MAX_IOVECS = 512  # below IOV_MAX (1024) everywhere
_SEND_BYTES = 1 << 20  # in one system call
_LENGTH = struct.Struct("<I")


class Patience(Protocol):
    def wait(self, sock: socket.socket) -> None:
        """Return when `sock` can be read; raises TimeoutError when it takes too long."""
        ...


class Deadline:
    """All reads together may take so long: for a handshake, where a trickle of bytes is no excuse."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._until = seconds, time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def wait(self, sock: socket.socket) -> None:
        if not _readable(sock, self.remaining):
            raise TimeoutError(f"no answer within {self._seconds:g} s")


class Liveness:
    """A peer that sends anything on any of its connections lives; `limit_s` of silence ends it. Thread-safe."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._heard_at = limit_s, time.monotonic()

    def heard(self) -> None:
        self._heard_at = time.monotonic()

    def wait(self, sock: socket.socket) -> None:
        # Look before judging: after a pause of this process itself the peer's pings wait in the socket.
        while not _readable(sock, max(0.0, self._heard_at + self._limit_s - time.monotonic())):
            if time.monotonic() >= self._heard_at + self._limit_s:
                raise TimeoutError(f"silent for {self._limit_s:g} s")
        self.heard()


def read_frame(
    sock: socket.socket, patience: Patience, session: Session | None = None, limit: int = MAX_FRAME_BYTES
) -> HandoffMessage:
    """The next message, authenticated when there is a session.

    Raises ProtocolError, TimeoutError, or ConnectionError when the peer is gone.
    """
    header = bytearray(_LENGTH.size)
    read_exact(sock, memoryview(header), patience)
    body = memoryview(read_body(sock, bytes(header), patience, limit))
    return handoff.decode(body) if session is None else session.open(body)


def read_body(sock: socket.socket, header: bytes, patience: Patience, limit: int) -> bytearray:
    """The bytes behind a length that has been read."""
    (length,) = _LENGTH.unpack(header)
    if not 0 < length <= limit:
        raise ProtocolError(f"hand-off frame of {length} bytes; the bound is {limit}")
    body = bytearray(length)
    read_exact(sock, memoryview(body), patience)
    return body


def read_exact(sock: socket.socket, view: memoryview, patience: Patience) -> None:
    """Fill `view`; raises ConnectionError at the end of the stream."""
    done = 0
    while done < len(view):
        patience.wait(sock)
        count = sock.recv_into(view[done:])
        if count == 0:
            raise ConnectionResetError("the peer closed the connection")
        done += count


def read_header_and_fd(sock: socket.socket, patience: Patience) -> tuple[bytes, int | None]:
    """The first frame's length on a Unix socket, and the descriptor that came with it, which the caller owns."""
    patience.wait(sock)
    header, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, 1, socket.MSG_CMSG_CLOEXEC)
    for extra in fds[1:]:
        os.close(extra)
    fd = fds[0] if fds else None
    try:
        rest = bytearray(_LENGTH.size - len(header))
        if not header:
            raise ConnectionResetError("the peer closed the connection")
        read_exact(sock, memoryview(rest), patience)
    except OSError:
        if fd is not None:
            os.close(fd)
        raise
    return header + bytes(rest), fd


def frame(message: HandoffMessage, session: Session | None = None) -> bytes:
    body = handoff.encode(message) if session is None else session.seal(message)
    return _LENGTH.pack(len(body)) + body


def send_frame(
    sock: socket.socket, message: HandoffMessage, session: Session | None = None, fd: int | None = None
) -> None:
    """Send one message, with a descriptor on its first byte when given (Unix sockets)."""
    data = frame(message, session)
    if fd is None:
        sock.sendall(data)
        return
    sent = socket.send_fds(sock, [data], [fd])
    sock.sendall(data[sent:])


def shut(sock: socket.socket) -> None:
    """Wake whoever reads or writes `sock`; it is closed by its owner."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed or was never connected: nothing can wait on it


def send_views(sock: socket.socket, views: Sequence[memoryview]) -> None:
    """Send all bytes of all views, straight from where they lie."""
    waiting = deque(part for view in views for part in _parts(view))
    while waiting:
        sent = sock.sendmsg(_next_batch(waiting))
        while sent:
            part = waiting.popleft()
            if sent < len(part):
                waiting.appendleft(part[sent:])
            sent -= min(sent, len(part))


def _parts(view: memoryview) -> Iterator[memoryview]:
    return (view[start : start + _SEND_BYTES] for start in range(0, len(view), _SEND_BYTES))


def _next_batch(waiting: deque[memoryview]) -> list[memoryview]:
    """What one system call takes: a bounded number of bytes, so that it does not block for long."""
    batch: list[memoryview] = []
    nbytes = 0
    for part in islice(waiting, _MAX_IOVECS):
        batch.append(part)
        nbytes += len(part)
        if nbytes >= _SEND_BYTES:
            break
    return batch


def _readable(sock: socket.socket, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))
