"""A byte stream under `TcpBulk`: a plain socket, or one with TLS. One thread sends, another receives."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from .wire import send_views, shut

_RECORDS_BYTES = 256 << 10  # given to TLS at once; the other direction waits for so much at most


class Pipe(Protocol):
    """Every call may raise OSError. `stop` from any thread ends the others soon."""

    def send(self, views: Sequence[memoryview]) -> None:
        """All bytes of all views, straight from where they lie."""
        ...

    def receive(self, views: Sequence[memoryview]) -> None:
        """Fill all views, in order; at most 512 of them."""
        ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


def pipe_over(sock: socket.socket) -> Pipe:
    """Takes the socket over."""
    return TlsPipe(sock) if isinstance(sock, ssl.SSLSocket) else PlainPipe(sock)


class PlainPipe(Pipe):
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, views: Sequence[memoryview]) -> None:
        send_views(self._sock, views)

    def receive(self, views: Sequence[memoryview]) -> None:
        waiting = list(views)
        while waiting:
            count = self._sock.recvmsg_into(waiting, 0, socket.MSG_WAITALL)[0]
            if count == 0:
                raise ConnectionResetError("the peer closed the data connection")
            waiting = _after(waiting, count)

    def stop(self) -> None:
        shut(self._sock)

    def close(self) -> None:
        self._sock.close()


class TlsPipe(Pipe):
    """OpenSSL allows one call at a time on a connection, so neither direction waits for the network inside one."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock, self._lock = sock, threading.Lock()
        sock.setblocking(False)

    def send(self, views: Sequence[memoryview]) -> None:
        for view in views:
            done = 0
            while done < len(view):
                part = view[done : done + _RECORDS_BYTES]
                done += self._attempt(lambda part=part: self._sock.send(part))  # type: ignore[misc]

    def receive(self, views: Sequence[memoryview]) -> None:
        for view in views:
            done = 0
            while done < len(view):
                part = view[done:]
                count = self._attempt(lambda part=part: self._sock.recv_into(part))  # type: ignore[misc]
                if count == 0:
                    raise ConnectionResetError("the peer closed the data connection")
                done += count

    def stop(self) -> None:
        # SSLSocket.shutdown would drop its TLS state first, and a read in progress would go on with the bare bytes.
        try:
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            return  # it is closed: nothing can wait on it

    def close(self) -> None:
        self._sock.close()

    def _attempt(self, call: Callable[[], int]) -> int:
        while True:
            try:
                with self._lock:
                    return call()
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)

    def _wait(self, event: int) -> None:
        poller = select.poll()
        poller.register(self._sock.fileno(), event)
        poller.poll()


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the views behind their first `count` bytes."""
    for at, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[at + 1 :]]
        count -= len(view)
    return []
