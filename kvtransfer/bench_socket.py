"""What a plain TCP socket reaches with the same bytes between the same two processes: the scale for tcp."""

from __future__ import annotations

import socket
import time

from ..engine.kv_memory import KVMemory
from .transports.pipes import PlainPipe
from .transports.tcp import tune

_PIECE = 1 << 20


class PlainSocket:
    """The receiving end listens on loopback; one connection for each run."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))

    @property
    def port(self) -> int:
        return int(self._listening.getsockname()[1])

    def receive(self, memory: KVMemory, nbytes: int) -> float:
        """Accept and read `nbytes` into the memory; the moment when all were there."""
        connection, _ = self._listening.accept()
        with connection:
            tune(connection, bulk=True)
            pipe = PlainPipe(connection)
            for start in range(0, nbytes, _PIECE):
                pipe.receive([memory.region[start : min(start + _PIECE, nbytes)]])
            return time.monotonic()

    def close(self) -> None:
        self._listening.close()


def send_plainly(memory: KVMemory, port: int, nbytes: int) -> float:
    """Connect and send `nbytes` of the memory; the moment before the first."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        tune(connection, bulk=True)
        started = time.monotonic()
        for start in range(0, nbytes, _PIECE):
            connection.sendall(memory.region[start : min(start + _PIECE, nbytes)])
        return started
