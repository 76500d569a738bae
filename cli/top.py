"""`penstock top`: both pools and the pipe between them, live."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from .arguments import Commands, add_command, add_server_options, number
from .errors import CliError

_DETAILS = """\
One row for each worker: what it runs, how busy it is, its KV blocks, its rates and its hand-offs, from two looks at the
cluster --interval seconds apart. On a terminal it goes on until Ctrl-C; elsewhere and with --once it prints one frame.
"""


def register(commands: Commands) -> None:
    parser = add_command(
        commands, "top", run, "Watch the workers of a running cluster.", _DETAILS, "penstock top --once --json"
    )
    add_server_options(parser)
    parser.add_argument(
        "--interval", type=number(0.1, 60), default=1.0, metavar="SECONDS", help="time between looks (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--json", action="store_true", help="print frames as JSON, one a line")


def run(args: argparse.Namespace) -> int:
    from .http_client import Server

    watch = Watch(Server(args.url, args.api_key))
    is_live = sys.stdout.isatty() and not args.once and not args.json
    if is_live:
        _live(watch, args.interval)
        return 0
    while True:
        frame = watch.next_frame(args.interval)
        print(json.dumps(frame) if args.json else _text(frame), flush=True)
        if args.once or not args.json:
            return 0


class Watch:
    """Looks at /status; each frame compares with the look before."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._before = self._look()

    def next_frame(self, interval_s: float) -> dict[str, Any]:
        from .top_frame import build_frame

        time.sleep(interval_s)
        before, self._before = self._before, self._look()
        return build_frame(before[1], self._before[1], self._before[0] - before[0])

    def _look(self) -> tuple[float, dict[str, Any]]:
        status = self._server.get("/status")
        if not isinstance(status, dict) or not isinstance(status.get("workers"), list):
            raise CliError(
                f"{self._server.url}/status has no list of workers", "is this a Penstock gateway? check --url"
            )
        return time.monotonic(), status


def _text(frame: dict[str, Any]) -> str:
    from .top_frame import format_frame

    return format_frame(frame)


def _live(watch: Watch, interval_s: float) -> None:
    """On the terminal's other screen, which comes back as it was; rich follows its size."""
    from rich.live import Live
    from rich.text import Text

    with Live(Text("looking…"), screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(Text(_text(watch.next_frame(interval_s)), no_wrap=True, overflow="ellipsis"), refresh=True)
        except KeyboardInterrupt:
            return
