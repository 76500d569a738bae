"""Anywhere: the bytes of a push come on a second connection, from block to block without a copy between."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence

from ...core.errors import TransferFailed
from ...core.ids import IdSource, SecureIds
from ...engine.kv_memory import KVMemory
from ..bulk import Bulk, Span
from .pipes import pipe_over
from .runs import chunks, merged, total_bytes

_CHUNK_BYTES = 1 << 20  # a revoked ticket waits for one read of this size at most
_SOCKET_BUFFER_BYTES = 4 << 20
_TOKEN_BYTES = 16
_MAX_VIEWS = 512  # in one system call; below IOV_MAX (1024) everywhere


def tune(sock: socket.socket, bulk: bool = False) -> None:
    """Settings for a control connection, or for one that carries blocks."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if bulk:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)


class TcpBulk(Bulk):
    """Straight from our memory into the socket, and from the socket into our memory. Owns the socket, plain or TLS."""

    quarantine_s = 0.0
    in_parts = True

    def __init__(self, memory: KVMemory, sock: socket.socket) -> None:
        self._memory, self._pipe, self._stopped = memory, pipe_over(sock), threading.Event()
        self._scratch = memoryview(bytearray(_CHUNK_BYTES))

    def send(self, spans: Sequence[Span]) -> None:
        region = self._memory.region
        self._check()
        self._pipe.send([region[offset : offset + nbytes] for offset, nbytes in merged(spans)])

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> None:
        region, left = self._memory.region, total_bytes(source)
        for chunk in chunks(target, _CHUNK_BYTES, _MAX_VIEWS):
            if not wanted():
                self._drain(left)
                return
            self._check()
            self._pipe.receive([region[offset : offset + nbytes] for offset, nbytes in chunk])
            left -= total_bytes(chunk)

    def discard(self, source: Sequence[Span]) -> None:
        self._drain(total_bytes(source))

    def stop(self) -> None:
        self._stopped.set()
        self._pipe.stop()

    def close(self) -> None:
        self._pipe.close()

    def _check(self) -> None:
        # What has arrived can still be read from a socket that is shut.
        if self._stopped.is_set():
            raise TransferFailed("the link is over")

    def _drain(self, nbytes: int) -> None:
        while nbytes:
            self._check()
            part = self._scratch[: min(nbytes, _CHUNK_BYTES)]
            self._pipe.receive([part])
            nbytes -= len(part)


class Rendezvous:
    """Brings a data connection to the link that waits for it, by a token nobody can guess. Thread-safe."""

    def __init__(self, ids: IdSource | None = None) -> None:
        self._ids = ids or SecureIds()
        self._waiting: dict[bytes, socket.socket | None] = {}
        self._changed = threading.Condition()

    def open(self) -> bytes:
        """A fresh token that a data connection may present once."""
        token = self._ids.token(_TOKEN_BYTES)
        with self._changed:
            self._waiting[token] = None
        return token

    def deliver(self, token: bytes, sock: socket.socket) -> bool:
        """Hand over a data connection; False when nobody waits for this token."""
        with self._changed:
            if token not in self._waiting or self._waiting[token] is not None:
                return False
            self._waiting[token] = sock
            self._changed.notify_all()
            return True

    def collect(self, token: bytes, timeout_s: float) -> socket.socket | None:
        """Wait for the data connection of `token`, which is used up with this call."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[token] is not None, timeout_s)
            return self._waiting.pop(token)

    def forget(self, token: bytes) -> None:
        """Give the token up when its handshake failed."""
        with self._changed:
            sock = self._waiting.pop(token, None)
        if sock is not None:
            sock.close()
