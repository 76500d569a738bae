"""What a worker says about itself on a link, and what it finds in the hello of another."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.ids import WorkerKey
from ..engine.kv_memory import KVMemory
from ..protocol.messages import Fingerprint, KvHello, Role
from .bulk import Transport
from .linking import SOURCE_ROLES
from .staging import StagingArea
from .transports.tls import Tls


@dataclass(frozen=True, slots=True)
class Identity:
    """`transports`: those allowed here, the preferred one first; `libraries`: those of them that a library serves."""

    key: WorkerKey
    role: Role
    fingerprint: Fingerprint
    transports: tuple[str, ...]
    host_id: str
    memory: KVMemory
    staging: StagingArea
    cluster_key: bytes
    wire_dtype: str = "lossless"
    digests: bool = True
    tls: Tls | None = None  # for the data connections of tcp
    libraries: Mapping[str, Transport] = field(default_factory=dict)

    def hello(self, peer_epoch: str | None, transports: tuple[str, ...], nonce: bytes, token: bytes = b"") -> KvHello:
        memory = self.memory
        return KvHello(
            worker_id=self.key.worker_id,
            epoch=self.key.epoch,
            peer_epoch=peer_epoch,
            fingerprint=self.fingerprint,
            transports=list(transports),
            host_id=self.host_id,
            num_blocks=memory.num_blocks,
            block_bytes=memory.block_bytes,
            nonce=nonce,
            staging_bytes=memory.staging_bytes,
            wire_dtypes=[self.wire_dtype],
            digests=self.digests,
            has_tls=self.tls is not None,
            offers={name: self.libraries[name].offer() for name in transports if name in self.libraries},
            token=token,
        )

    def pool_fd(self) -> int | None:
        """The descriptor to pass, when this worker can be a source."""
        return self.memory.fileno() if self.role in SOURCE_ROLES else None


def region_bytes(hello: KvHello) -> int:
    """Size of the memory that a peer registers: its blocks and its staging."""
    return hello.num_blocks * hello.block_bytes + hello.staging_bytes


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
