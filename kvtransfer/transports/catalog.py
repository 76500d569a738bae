"""Transports by name: which can be used here, and which one two workers take. Libraries are imported when asked for."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ...core.ids import WorkerKey
from ...engine.kv_memory import KVMemory
from ..bulk import Transport, Unusable
from .owner import NAME as OWNER

LIBRARIES: tuple[str, ...] = ("nixl", "ucx", "gloo", "nccl", "cuda_ipc")
ALL = ("shm", "tcp", OWNER, *LIBRARIES)

MemoryKind = Literal["cpu", "cuda"]

# Taken without being asked for, best first. The others are used only where someone has named them.
PREFERENCE: dict[MemoryKind, tuple[str, ...]] = {
    "cpu": ("shm", "nixl", "tcp"),
    "cuda": ("cuda_ipc", "nixl", "tcp"),
}
_ON_ONE_HOST = {"shm", "cuda_ipc"}


def available(name: str) -> str | None:
    """None when `name` can be used here, else why not and what would help. Loads nothing, so it may be too hopeful."""
    if name not in ALL:
        return f"no such transport; choose from {', '.join(ALL)}"
    if name == OWNER and not hasattr(os, "memfd_create"):
        return "this system has no memory files (Linux has)"
    if name in ("nixl", "ucx") and sys.platform != "linux":
        return "it works on Linux only; use tcp"
    if name == "nixl" and not (_is_installed("nixl_cu12") or _is_installed("nixl")):
        return "it is not installed; pip install --no-deps nixl-cu12"
    if name == "ucx" and not _is_installed("ucxx"):
        return "it is not installed; pip install 'penstock[ucx]'"
    if name in ("nccl", "cuda_ipc") and not Path("/dev/nvidiactl").exists():
        return "CUDA is absent; it needs an NVIDIA GPU, a CUDA build of torch and pip install 'penstock[gpu]'"
    return None


def open_transport(name: str, memory: KVMemory, me: WorkerKey, host: str = "127.0.0.1") -> Transport:
    """Register `memory` with the library called `name`; raises Unusable when that cannot be done here.

    `host`: an address of this worker that its peers reach, for those that listen by themselves.
    """
    obstacle = available(name)
    if obstacle is not None:
        raise Unusable(f"{name}: {obstacle}")
    makers: dict[str, Callable[[], Transport]] = {
        "nixl": lambda: _nixl(memory, me),
        "ucx": lambda: _ucx(memory, me),
        "gloo": lambda: _process_group("gloo", memory, me, host),
        "nccl": lambda: _process_group("nccl", memory, me, host),
        "cuda_ipc": lambda: _cuda_ipc(memory, me),
    }
    if name not in makers:
        raise Unusable(f"{name} needs no library: the handshake makes its links")
    return makers[name]()


def choose(mine: tuple[str, ...], theirs: tuple[str, ...], same_host: bool, kind: MemoryKind) -> tuple[str, str]:
    """(name, why), from what each side allows; the name is empty where there is none.

    What only a person can have asked for (`ucx`, `gloo`, `nccl`) goes first, in the order of `mine`, then PREFERENCE.
    """
    asked_for = [name for name in mine if name not in PREFERENCE[kind]]
    obstacles: list[str] = []
    for name in [*asked_for, *(name for name in PREFERENCE[kind] if name in mine)]:
        if name not in theirs:
            obstacles.append(f"no {name}: the peer does not allow it")
        elif name in _ON_ONE_HOST and not same_host:
            obstacles.append(f"no {name}: the peer is on another host")
        else:
            why = "asked for by name" if name in asked_for or len(mine) == 1 else f"best for {kind} memory"
            return name, "; ".join([why, *obstacles])
    return "", "; ".join(obstacles) or "no transport is allowed here"


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _nixl(memory: KVMemory, me: WorkerKey) -> Transport:
    from .nixl import NixlTransport

    return NixlTransport(memory, me)


def _ucx(memory: KVMemory, me: WorkerKey) -> Transport:
    from .ucx import UcxTransport

    return UcxTransport(memory, me)


def _process_group(name: str, memory: KVMemory, me: WorkerKey, host: str) -> Transport:
    from .process_group import ProcessGroupTransport

    return ProcessGroupTransport(name, memory, me, host)


def _cuda_ipc(memory: KVMemory, me: WorkerKey) -> Transport:
    from .cuda_ipc import CudaIpcTransport

    return CudaIpcTransport(memory, me)
