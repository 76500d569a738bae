"""Topology → the processes of one machine: their command lines, environments and threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..core.config import Topology, WorkerSpec
from ..engine.shared_files import SharedFiles
from ..engine.threads import thread_environment
from .child import child_environment
from .runtime_dir import TOPOLOGY_FILE
from .supervisor import ChildSpec

_ROLE_COMMANDS = {"prefill": "prefill", "decode": "decode", "both": "decode"}


def child_specs(
    topology: Topology,
    runtime_dir: Path,
    environment: Mapping[str, str] = os.environ,
    shared: SharedFiles | None = None,
) -> list[ChildSpec]:
    """The front and every worker of `topology`, whose file lies in `runtime_dir`. Workers inherit `shared`."""
    path = str(runtime_dir / TOPOLOGY_FILE)
    front = ChildSpec("router", _command("router", path), child_environment(environment, {}), is_front=True)
    return [front, *(_worker_spec(worker, path, environment, shared) for worker in topology.workers())]


def _worker_spec(
    worker: WorkerSpec, topology_file: str, environment: Mapping[str, str], shared: SharedFiles | None
) -> ChildSpec:
    command = _command(_ROLE_COMMANDS[worker.role], topology_file, "--name", worker.name)
    extra = worker_threads(worker) | (shared.environment() if shared is not None else {})
    inherited = shared.fds if shared is not None else ()
    return ChildSpec(worker.name, command, child_environment(environment, extra), inherited=inherited)


def _command(role: str, topology_file: str, *rest: str) -> tuple[str, ...]:
    """-P keeps the working folder off the module path, where a folder's name could shadow a package."""
    return (sys.executable, "-P", "-m", "penstock", role, "--topology", topology_file, *rest)


def worker_threads(worker: WorkerSpec) -> dict[str, str]:
    """The environment that gives a worker its threads; it counts only before torch is imported."""
    return thread_environment(worker.config.threads or available_cores())


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def split_threads(topology: Topology, total: int) -> Topology:
    """`total` threads divided evenly over the workers, at least one each."""
    each = max(1, total // len(topology.workers()))
    return replace(
        topology, prefill=replace(topology.prefill, threads=each), decode=replace(topology.decode, threads=each)
    )
