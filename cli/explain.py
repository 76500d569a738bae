"""`penstock explain`: where the time of recent requests went, what holds them up, and what would help."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .arguments import Commands, add_command, add_server_options, number
from .errors import CliError

_DETAILS = """\
Splits the time to the first token, and the gaps between tokens, into parts that add up; names the part that holds
requests up, with the figures it rests on; and replays the window's requests on a cluster with a worker more or fewer.
docs/EXPLAIN.md tells what each part means and what the replay leaves out."""


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "explain",
        run,
        "Say where the time of recent requests goes, and what would help.",
        _DETAILS,
        "penstock explain --window 30",
    )
    add_server_options(parser)
    parser.add_argument(
        "--window",
        type=number(1, 300),
        default=60.0,
        metavar="SECONDS",
        help="how far to look back, 1 to 300 (default: 60)",
    )
    parser.add_argument(
        "--request",
        metavar="ID",
        help="one recent request, by the `id` of its answer or its X-Request-Id (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print the gateway's document")


def run(args: argparse.Namespace) -> int:
    import urllib.parse

    from .explain_text import format_explanation, format_requests
    from .http_client import Server

    server = Server(args.url, args.api_key)
    if args.request:
        path, key, show = f"/explain/{urllib.parse.quote(args.request, safe='')}", "requests", format_requests
    else:
        path, key, show = f"/explain?window_s={args.window:g}", "ttft", format_explanation
    document = server.get(path)
    if not isinstance(document, dict) or key not in document:
        raise CliError(f"{args.url}{path} has no `{key}`", "is this a Penstock gateway of this version? check --url")
    print(json.dumps(document, indent=2) if args.json else _shown(document, show, args.url))
    return 0


def _shown(document: dict[str, Any], show: Any, url: str) -> str:
    try:
        text: str = show(document)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CliError(
            f"{url} explains itself in a form that this command does not know: {err!r}", "try --json"
        ) from err
    return text
