"""Transports that a library serves, by name. Their modules are imported when they are asked for."""

from __future__ import annotations

from ...core.ids import WorkerKey
from ...engine.kv_memory import KVMemory
from ..bulk import Transport, Unusable

LIBRARIES: tuple[str, ...] = ()
ALL = ("shm", "tcp", *LIBRARIES)


def available(name: str) -> str | None:
    """None when `name` can be used here, else why not and what would help."""
    return None if name in ALL else "no such transport"


def open_transport(name: str, memory: KVMemory, me: WorkerKey) -> Transport:
    """Register `memory` with the library called `name`; raises Unusable when that cannot be done here."""
    raise Unusable(f"{name}: no such transport")
