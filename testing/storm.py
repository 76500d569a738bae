"""I11 at the door of the hand-off: whoever connects and says nothing takes one of few places, and no thread beyond."""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path

from ..core.ids import SeededIds, WorkerKey, new_epoch
from ..engine.kv_memory import KVMemory
from ..kvtransfer.mesh import SocketMesh
from ..protocol.messages import Fingerprint
from .invariants import InvariantBroken

MAX_PLACES = 64
NUM_STRANGERS = 96


def check_connection_storm() -> None:
    """Strangers connect all at once to a real mesh; those beyond its places are sent away on the spot."""
    memory, key = KVMemory(2, 1, 64), WorkerKey("prefill-0", new_epoch(SeededIds(0)))
    fingerprint = Fingerprint("fake", "fake", "u64", 1, 1, 1, 4, "block-major")
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        mesh = SocketMesh(
            key, "prefill", fingerprint, memory, lambda event: None, runtime_dir=Path(folder), cluster_key=b""
        )
        threads = threading.active_count()
        strangers = [_knock(mesh) for _ in range(NUM_STRANGERS)]
        try:
            inside = sum(not _was_sent_away(sock) for sock in strangers)
            spent = threading.active_count() - threads
        finally:
            mesh.close()
            for sock in strangers:
                sock.close()
            memory.close()
    if inside > MAX_PLACES or spent > MAX_PLACES:
        raise InvariantBroken(f"I11 mesh: {inside} silent strangers are let in and take {spent} threads")


def _knock(mesh: SocketMesh) -> socket.socket:
    """One connection, accepted at once; our end of it."""
    ours, theirs = socket.socketpair()
    mesh._accepted(theirs)
    ours.setblocking(False)
    return ours


def _was_sent_away(sock: socket.socket) -> bool:
    try:
        while data := sock.recv(65536):
            assert data
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    return True
