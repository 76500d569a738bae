"""`penstock router`, `prefill` and `decode`: one process of a cluster, joined to the others by the topology file."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .arguments import Commands, add_command
from .errors import USAGE, CliError

if TYPE_CHECKING:
    from ..core.config import Topology, WorkerSpec

_DETAILS = """\
`penstock serve` starts this by itself; run it alone to give a process its own terminal, cores or limits. All processes
of one cluster get the same topology file and find each other through it. SIGTERM or Ctrl-C drains it."""


def register(commands: Commands) -> None:
    router = add_command(
        commands,
        "router",
        run_router,
        "Run the router and the HTTP gateway alone.",
        _DETAILS,
        "penstock router --topology cluster.yaml",
    )
    _add_topology(router)
    for role in ("prefill", "decode"):
        example = f"penstock {role} --topology cluster.yaml --name {role}-0"
        parser = add_command(commands, role, run_worker, f"Run one {role} worker alone.", _DETAILS, example)
        _add_topology(parser)
        parser.add_argument("--name", help=f"which worker of the topology (default: the first {role} worker)")
        parser.set_defaults(role=role)


def _add_topology(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology", metavar="FILE", required=True, help="YAML topology, or a Ray launcher file with metadata.penstock"
    )


def run_router(args: argparse.Namespace) -> int:
    from ..core.logging import setup_logging
    from ..deploy.child import die_with_supervisor

    die_with_supervisor()
    topology = role_topology(args.topology)
    setup_logging("router", topology.log_level)
    from ..deploy.front import main

    return main(topology)


def run_worker(args: argparse.Namespace) -> int:
    from ..core.logging import setup_logging
    from ..deploy.child import die_with_supervisor
    from ..deploy.launch import worker_threads

    die_with_supervisor()
    topology = role_topology(args.topology)
    worker = find_worker(topology, args.role, args.name)
    setup_logging(worker.name, topology.log_level)
    for name, value in worker_threads(worker).items():  # read by the thread library when torch is imported
        os.environ.setdefault(name, value)
    from ..deploy.hosting import main

    return main(topology, worker.name)


def role_topology(path: str) -> Topology:
    """The topology in `path` with its runtime folder made and its model on this disk."""
    from ..core.config import load_topology
    from ..deploy.runtime_dir import named_folder, shared_folder
    from .model_files import with_local_model

    topology = load_topology(path)
    folder = named_folder(topology.runtime_dir) if topology.runtime_dir else shared_folder(path)
    return with_local_model(replace(topology, runtime_dir=str(folder)))


def find_worker(topology: Topology, command: str, name: str | None) -> WorkerSpec:
    """The worker that `penstock prefill|decode [--name]` means. `decode` also runs workers of role `both`."""
    roles = {"prefill"} if command == "prefill" else {"decode", "both"}
    known = [worker.name for worker in topology.workers() if worker.role in roles]
    if not known:
        raise CliError(f"the topology has no {command} worker", "a colocated topology has only decode workers", USAGE)
    if name is not None and name not in known:
        raise CliError(f"--name: the topology has no {command} worker {name!r}", f"it has {', '.join(known)}", USAGE)
    return topology.worker(name or known[0])
