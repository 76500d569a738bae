"""`penstock role`: give a worker another role. `penstock restart`: start workers again, one after the other."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from .arguments import Commands, add_command, add_server_options, number
from .errors import CliError
from .terminal import printable

LOOK_S = 0.1
PHASES_OF = {"prefill": ("prefill",), "decode": ("decode",), "both": ("prefill", "decode")}

_ROLE_DETAILS = """\
What runs on the worker goes on, and its caches stay. The worker takes the new role within moments; when its process
ends and is started again it begins with the role that the topology gives it. At least one worker must decode."""

_RESTART_DETAILS = """\
Each worker in turn is asked to drain (SIGTERM): it takes nothing new, finishes what runs, and ends. The supervisor
starts it again, and the next one follows when it is ready and linked. Requests wait or go on elsewhere meanwhile.
Works on the machine of the workers, for the user who runs them."""


def register(commands: Commands) -> None:
    role = add_command(
        commands, "role", run_role, "Give a worker another role.", _ROLE_DETAILS, "penstock role decode-1 prefill"
    )
    role.add_argument("worker", metavar="WORKER", help="its name in `penstock status`")
    role.add_argument("role", choices=("prefill", "decode", "both"), help="what it is for from now on")
    add_server_options(role)
    _add_timeout(role, 30.0)
    restart = add_command(
        commands,
        "restart",
        run_restart,
        "Start the workers of a running cluster again, one after the other.",
        _RESTART_DETAILS,
        "penstock restart decode-0",
    )
    restart.add_argument("workers", nargs="*", metavar="WORKER", help="which, in this order (default: all)")
    add_server_options(restart)
    _add_timeout(restart, 300.0)


def _add_timeout(parser: argparse.ArgumentParser, default_s: float) -> None:
    parser.add_argument(
        "--timeout",
        type=number(1, 3600),
        default=default_s,
        metavar="SECONDS",
        help=f"how long to wait for a worker (default: {default_s:g})",
    )


def run_role(args: argparse.Namespace) -> int:
    import urllib.parse

    from .http_client import Server

    server = Server(args.url, args.api_key)
    server.post(f"/workers/{urllib.parse.quote(args.worker, safe='')}/role", {"role": args.role})
    row = _wait(server, args.worker, lambda found, _: found["role"] == args.role, args.timeout, f"to be {args.role}")
    print(f"{printable(args.worker)} is for {row['role']}: {row['running']} running, {row['waiting']} waiting")
    return 0


def run_restart(args: argparse.Namespace) -> int:
    from .http_client import Server

    server = Server(args.url, args.api_key)
    rows = _rows(server)
    names = args.workers or list(rows)
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise CliError(f"worker {unknown[0]!r} is not there", f"there are {', '.join(rows) or 'none'}")
    for name in names:
        print(f"{printable(name)}: draining", file=sys.stderr, flush=True)
        took_s = _restart(server, name, args.timeout)
        print(f"{printable(name)}: ready again after {took_s:.1f} s", flush=True)
    return 0


def _restart(server: Any, name: str, timeout_s: float) -> float:
    began, before = time.monotonic(), _rows(server)[name]
    try:
        os.kill(int(before["pid"]), signal.SIGTERM)
    except (ProcessLookupError, PermissionError) as err:
        raise CliError(
            f"worker {name}: process {before['pid']}: {err.strerror}", "run this on its machine, as its user"
        ) from err

    def is_back(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> bool:
        is_new = row["epoch"] != before["epoch"] and row["state"] == "ready"
        return is_new and partners_of(name, rows) <= set(row.get("transports") or {})

    _wait(server, name, is_back, timeout_s, "to be ready and linked again")
    return time.monotonic() - began


def partners_of(name: str, rows: dict[str, dict[str, Any]]) -> set[str]:
    """The ready workers that hand over to this one, or it to them."""
    mine = PHASES_OF[rows[name]["role"]]
    ready = {other: row for other, row in rows.items() if other != name and row["state"] == "ready"}
    return {other for other, row in ready.items() if mine != PHASES_OF[row["role"]] or len(mine) > 1}


IsDone = Callable[[dict[str, Any], dict[str, dict[str, Any]]], bool]  # of the worker's row, and all rows


def _wait(server: Any, name: str, is_done: IsDone, timeout_s: float, wanted: str) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while True:
        rows = _rows(server)
        row = rows.get(name)
        if row is not None and is_done(row, rows):
            return row
        if time.monotonic() > deadline:
            state = row["state"] if row else "gone"
            raise CliError(
                f"worker {name}: {timeout_s:g} s are not enough for it {wanted}; it is {state}", "its log says more"
            )
        time.sleep(LOOK_S)


def _rows(server: Any) -> dict[str, dict[str, Any]]:
    """The workers by name; raises CliError for an answer without them."""
    status = server.get("/status")
    if not isinstance(status, dict) or not isinstance(status.get("workers"), list):
        raise CliError(f"{server.url}/status has no list of workers", "is this a Penstock gateway? check --url")
    return {str(row["worker_id"]): row for row in status["workers"]}
