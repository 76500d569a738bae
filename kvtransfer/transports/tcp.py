"""Anywhere: the bytes of a push follow its frame on a second connection, from block to block without a copy between."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence

from ...core.ids import IdSource, SecureIds
from ...engine.kv_memory import KVMemory
from ...protocol.messages import Push
from ..acceptance import Acceptances
from .runs import run_length, run_view, runs
from .wire import Patience, frame, read_exact, send_views

_CHUNK_BYTES = 1 << 20  # a revoked ticket waits for one read of this size at most
_SOCKET_BUFFER_BYTES = 4 << 20
_TOKEN_BYTES = 16


def tune(sock: socket.socket, bulk: bool = False) -> None:
    """Settings for a control connection, or for one that carries blocks."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if bulk:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)


def send_push(
    sock: socket.socket, memory: KVMemory, push: Push, block_ids: Sequence[int], between: Callable[[], None]
) -> None:
    """Send the frame and the bytes; `between` runs after each system call, to keep pings going on a slow network."""
    max_length = run_length(push, memory, _CHUNK_BYTES)
    spans = [run_view(memory, push, block_ids[at], length) for at, length in runs(block_ids, max_length=max_length)]
    send_views(sock, [memoryview(frame(push)), *spans], between)


def receive_push(
    sock: socket.socket,
    memory: KVMemory,
    push: Push,
    blocks: Sequence[int] | None,
    acceptances: Acceptances,
    patience: Patience,
) -> None:
    """Read the bytes behind `push` into `blocks`; into nothing for a push that was refused, or once it is revoked."""
    if blocks is None:
        _drain(sock, len(push.ordinals) * push.num_layers * memory.layer_bytes, patience)
        return
    span_bytes = push.num_layers * memory.layer_bytes
    for start, length in runs(blocks, max_length=run_length(push, memory, _CHUNK_BYTES)):
        if acceptances.is_revoked(push):
            _drain(sock, (len(blocks) - start) * span_bytes, patience)
            return
        read_exact(sock, run_view(memory, push, blocks[start], length), patience)


def _drain(sock: socket.socket, nbytes: int, patience: Patience) -> None:
    scratch = memoryview(bytearray(min(nbytes, _CHUNK_BYTES)))
    while nbytes:
        part = scratch[: min(nbytes, len(scratch))]
        read_exact(sock, part, patience)
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
        until = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[token] is not None, max(0.0, until - time.monotonic()))
            return self._waiting.pop(token)

    def forget(self, token: bytes) -> None:
        """Give the token up when its handshake failed."""
        with self._changed:
            sock = self._waiting.pop(token, None)
        if sock is not None:
            sock.close()
