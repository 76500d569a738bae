"""Shared memory and TCP as a `Transport`: in the product the handshake makes their links; tests treat all alike.

`SocketTransport("shm" | "tcp" | "tls", …)` listens on a Unix socket in `folder`, or on loopback.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from ..core.ids import WorkerKey
from ..engine.kv_memory import KVMemory
from ..kvtransfer.bulk import Bulk, LinkFacts, Transport, Unusable
from ..kvtransfer.transports.shm import MappedPool, ShmBulk
from ..kvtransfer.transports.tcp import TcpBulk, tune
from ..kvtransfer.transports.tls import Tls, TlsFiles


class SocketTransport(Transport):
    """One end of links by shared memory, TCP, or TCP with TLS; `folder` holds the socket and the certificates."""

    def __init__(self, name: str, memory: KVMemory, me: WorkerKey, folder: Path) -> None:
        self.name, self._memory = name, memory
        self._tls = Tls(tls_files(folder, me.worker_id)) if name == "tls" else None
        self._listener = socket.socket(socket.AF_UNIX if name == "shm" else socket.AF_INET)
        self._listener.bind(str(folder / f"{me.epoch}.sock") if name == "shm" else ("127.0.0.1", 0))
        self._listener.listen()

    def offer(self) -> bytes:
        address = self._listener.getsockname()
        return (address if self.name == "shm" else str(address[1])).encode()

    def connect(self, facts: LinkFacts, peer_offer: bytes) -> Bulk:
        sock = self._dial(peer_offer, facts) if facts.is_dialer else self._accept(facts)
        if self.name == "shm":
            with sock:
                return ShmBulk(self._memory, self._exchange_pools(sock, facts))
        tune(sock, bulk=True)
        if self._tls is not None:
            sock = self._tls.wrap(sock, facts.is_dialer, facts.timeout_s)
        sock.settimeout(None)
        return TcpBulk(self._memory, sock)

    def close(self) -> None:
        self._listener.close()

    def _dial(self, peer_offer: bytes, facts: LinkFacts) -> socket.socket:
        address = peer_offer.decode() if self.name == "shm" else ("127.0.0.1", int(peer_offer))
        sock = socket.socket(self._listener.family)
        sock.settimeout(facts.timeout_s)
        sock.connect(address)
        return sock

    def _accept(self, facts: LinkFacts) -> socket.socket:
        self._listener.settimeout(facts.timeout_s)
        sock, _ = self._listener.accept()
        sock.settimeout(facts.timeout_s)
        return sock

    def _exchange_pools(self, sock: socket.socket, facts: LinkFacts) -> MappedPool:
        fd = self._memory.fileno()
        if fd is None:
            raise Unusable("this system has no memfd")
        socket.send_fds(sock, [b"f"], [fd])
        _, fds, _, _ = socket.recv_fds(sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        assert [os.fstat(got).st_size for got in fds] == [facts.peer_bytes]
        return MappedPool(fds[0], facts.peer_bytes)


def tls_files(folder: Path, worker_id: str) -> TlsFiles:
    """Where the certificates of a test lie."""
    return TlsFiles(folder / f"{worker_id}.pem", folder / f"{worker_id}.key", folder / "authority.pem")
