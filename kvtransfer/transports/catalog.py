"""Transports that a library serves, by name. Their modules are imported when they are asked for."""

from __future__ import annotations

from ...core.ids import WorkerKey
from ...engine.kv_memory import KVMemory
from ..bulk import Transport, Unusable

LIBRARIES: tuple[str, ...] = ()


def open_transport(name: str, memory: KVMemory, me: WorkerKey) -> Transport:
    """Register `memory` with the library called `name`; raises Unusable when that cannot be done here."""
    raise Unusable(f"{name}: no such transport")
