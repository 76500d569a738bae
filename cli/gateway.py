"""`penstock gateway`: one more router with an HTTP gateway of its own, on the workers of a running cluster."""

from __future__ import annotations

import argparse
import os
import socket
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Commands, add_command, whole_number
from .errors import USAGE, CliError

if TYPE_CHECKING:
    from ..core.config import Topology

_DETAILS = """\
The workers of a running cluster serve it beside those that are there. Gateways share the workers' memory, caches and
steps, and nothing else: each routes its own requests, sees in the workers' heartbeats what the others cause there, and
goes on when another one ends. SIGTERM or Ctrl-C drains it; started again with the same port or name it takes its old
place. The cluster's supervisor does not keep it alive."""


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "gateway",
        run,
        "Run one more gateway on the workers of a running cluster.",
        _DETAILS,
        "penstock gateway --port 8001",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--join", metavar="DIR", help="runtime folder of the cluster (default: that of the one that runs here)"
    )
    which.add_argument("--topology", metavar="FILE", help="topology of a cluster whose processes were started by hand")
    parser.add_argument("--host", help="address to listen on; other than loopback needs a key (default: the cluster's)")
    parser.add_argument(
        "--port",
        type=whole_number(0, 65535),
        required=True,
        help="port to listen on, 0 for any free one",
    )
    parser.add_argument("--name", help="what the workers call it (default: its port)")


def run(args: argparse.Namespace) -> int:
    from ..core.config import check_topology
    from ..core.logging import setup_logging
    from ..deploy.ports import port_problem
    from .roles import role_topology

    topology = role_topology(args.topology or str(_topology_file(args.join)))
    host = args.host or topology.gateway.host
    topology = check_topology(replace(topology, gateway=replace(topology.gateway, host=host, port=args.port)))
    name = args.name or str(args.port or os.getpid())
    setup_logging(f"gateway {name}", topology.log_level)
    problem = port_problem(host, args.port)
    if problem is not None:
        raise CliError(problem, "stop what listens there, or choose another port with --port")
    _check_name(topology, name)
    from ..deploy.front import main

    return main(topology, name)


def _topology_file(folder: str | None) -> Path:
    """The topology of the cluster in `folder`, or of the only one that runs here. Raises CliError."""
    from ..deploy.runtime_dir import TOPOLOGY_FILE, base_folder, running_folders

    if folder is not None:
        file = Path(folder).absolute() / TOPOLOGY_FILE
        if not file.is_file():
            raise CliError(f"--join: {folder} has no {TOPOLOGY_FILE}: no cluster runs there", "", USAGE)
        return file
    found = running_folders(base_folder())
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise CliError(f"clusters that run here: {names}", "name one with --join DIR, or start one: `penstock serve`")
    return found[0] / TOPOLOGY_FILE


def _check_name(topology: Topology, name: str) -> None:
    """Raise CliError when a living gateway has this name: two would end each other's requests."""
    path = topology.address_of(name).removeprefix("ipc://")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise CliError(f"--name: a gateway {name!r} runs on this cluster already", "give another --name", USAGE)
