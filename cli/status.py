"""`penstock status`: the workers of a running cluster."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .arguments import Commands, add_command, add_server_options
from .errors import CliError
from .notes import role_notes, worker_notes
from .terminal import has_colour, printable, style, table

_NUMBERS = ("free_blocks", "total_blocks", "running", "waiting")
_COLOURS = {"ready": "green", "lost": "red"}


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "status",
        run,
        "List the workers of a running cluster.",
        "Shows role, pid, epoch (changes with each restart), state, KV blocks, and running and waiting sequences.",
        "penstock status --json | jq '.workers[].state'",
    )
    add_server_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON with the key `workers`")


def run(args: argparse.Namespace) -> int:
    from .http_client import Server

    status = Server(args.url, args.api_key).get("/status")
    if not isinstance(status, dict) or not isinstance(status.get("workers"), list):
        raise CliError(f"{args.url}/status has no list of workers", "is this a Penstock gateway? check --url")
    if args.json:
        print(json.dumps(status, indent=2))
    else:
        print(format_status(status, has_colour(sys.stdout)))
    return 0


def format_status(status: dict[str, Any], is_coloured: bool = False) -> str:
    """The table for people, then one line about the whole cluster."""
    header = ("WORKER", "ROLE", "PID", "EPOCH", "STATE", "FREE/TOTAL BLOCKS", "RUNNING", "WAITING", "LINKS")
    lines = table([header, *(_row(worker) for worker in status["workers"])], right=frozenset({2, 5, 6, 7})).split("\n")
    for number, worker in enumerate(status["workers"], start=1):
        state = str(worker.get("state", ""))
        if state in _COLOURS:
            lines[number] = lines[number].replace(state, style(state, _COLOURS[state], is_coloured), 1)
    notes = [*worker_notes(status["workers"]), *role_notes(status.get("role_changes") or [])]
    return "\n".join([*lines, _summary(status), *notes])


def _row(worker: dict[str, Any]) -> tuple[str, ...]:
    free, total, running, waiting = (str(worker.get(name, 0)) for name in _NUMBERS)
    transports = worker.get("transports") or {}
    links = ", ".join(f"{peer}:{transport}" for peer, transport in sorted(transports.items()))
    names = (str(worker.get(name, "")) for name in ("worker_id", "role", "pid", "epoch", "state"))
    worker_id, role, pid, epoch, state = names
    cells = (worker_id, role, pid, epoch[:6], state, f"{free}/{total}", running, waiting, links or "-")
    return tuple(printable(cell) for cell in cells)


def _summary(status: dict[str, Any]) -> str:
    active, queued = status.get("active_requests", 0), status.get("queued_requests", 0)
    ready = "ready" if status.get("ready", True) else f"not ready: {printable(str(status.get('why_not_ready', '')))}"
    return f"{ready}; {active} requests active, {queued} queued"
