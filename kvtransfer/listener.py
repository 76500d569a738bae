"""Where other workers knock: a Unix socket in a private directory and a loopback TCP port, one thread for both."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import selectors
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from ..core.errors import ConfigError
from .transports.address import KvAddress, require_loopback, socket_path

logger = logging.getLogger(__name__)

_BACKLOG = 1024
_PAUSE_S = 0.1  # after a failed accept, which may fail again at once


class Listener:
    """Calls `accepted` with each connection, on its own thread. Closing is idempotent and removes the socket file."""

    def __init__(self, runtime_dir: Path, worker_id: str, host: str, accepted: Callable[[socket.socket], None]) -> None:
        require_loopback(host)
        self._accepted = accepted
        self._path = socket_path(runtime_dir, worker_id)
        with contextlib.ExitStack() as undo:
            self._tcp = undo.enter_context(_listen_tcp(host))
            self._unix = undo.enter_context(_listen_unix(self._path))
            self._wake, self._woken = socket.socketpair()
            undo.pop_all()
        self._inode = self._path.stat().st_ino
        self.address = KvAddress(str(self._path), (host, self._tcp.getsockname()[1]))
        self._thread = threading.Thread(target=self._run, name=f"kv-accept-{worker_id}")
        self._thread.start()

    def close(self) -> None:
        """Stop accepting. A successor that has taken the path over keeps it."""
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        self._thread.join()
        self._wake.close()
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _run(self) -> None:
        with self._unix, self._tcp, self._woken, selectors.DefaultSelector() as selector:
            for sock in (self._unix, self._tcp, self._woken):
                selector.register(sock, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._woken in ready:
                    return
                for listening in (self._unix, self._tcp):
                    if listening in ready:
                        self._accept(listening)

    def _accept(self, listening: socket.socket) -> None:
        try:
            connection, _ = listening.accept()
        except OSError as err:
            # The caller gave up in between, or this process is out of descriptors: neither ends the listener.
            logger.warning("accepting a hand-off connection failed: %s", err)
            select.select([self._woken], [], [], _PAUSE_S)
            return
        self._accepted(connection)


def _listen_tcp(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    sock.setblocking(False)
    return sock


def _listen_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # of an earlier incarnation that was killed
        sock.bind(os.fspath(path))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as err:
        sock.close()
        raise ConfigError(f"hand-off socket {path}: {err}; is runtime_dir writable?") from err
    return sock
