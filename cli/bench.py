"""`penstock bench`: measurements of this machine."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from .arguments import Commands, Parser, add_command, whole_number
from .errors import CliError
from .terminal import table

if TYPE_CHECKING:
    from ..kvtransfer.transfer_bench import TransferFigures

_DETAILS = """\
Hands one long prompt, many short ones and single blocks over between two processes on this machine, with everything a
real hand-off does, and copies the same bytes plainly in the same run. GB/s, share of the copy's speed, time of the
smallest hand-off, and processor seconds of both processes for each gigabyte. Transports that cannot be used here are
named with the reason. Run it on an otherwise idle machine."""


def register(commands: Commands) -> None:
    details = "Each measurement is a command of its own; see `penstock bench transfer --help`."
    parser = add_command(commands, "bench", _needs_a_part, "Measure this machine.", details, "penstock bench transfer")
    parts = parser.add_subparsers(title="measurements", metavar="WHAT", dest="what", parser_class=Parser)
    transfer = add_command(
        parts,
        "transfer",
        run_transfer,
        "Measure how fast each transport hands a KV cache over.",
        _DETAILS,
        "penstock bench transfer --transports shm,tcp --json",
    )
    transfer.add_argument(
        "--transports", metavar="NAMES", help="comma-separated names (default: all that can be used here)"
    )
    transfer.add_argument(
        "--tokens", type=whole_number(16, 1 << 20), default=8192, help="length of the long prompt (default: 8192)"
    )
    transfer.add_argument(
        "--rounds", type=whole_number(1, 1000), default=7, help="repetitions of each figure (default: 7)"
    )
    transfer.add_argument("--json", action="store_true", help="print a JSON list, one object for each transport")


def _needs_a_part(args: argparse.Namespace) -> int:
    raise CliError("bench: say what to measure", "`penstock bench transfer`")


def run_transfer(args: argparse.Namespace) -> int:
    from ..kvtransfer.transports.catalog import ALL, available

    names = args.transports.split(",") if args.transports else list(ALL)
    unknown = [name for name in names if name not in ALL]
    if unknown:
        raise CliError(f"--transports: {unknown[0]!r} is not one of {', '.join(ALL)}")
    figures: list[TransferFigures] = []
    for name in names:
        obstacle = available(name)
        if obstacle is None:
            figures.append(_measure(name, args))
        else:
            _say(f"{name}: left out: {obstacle}")
            if args.transports:
                raise CliError(f"--transports: {name} cannot be used here: {obstacle}")
    print(_as_json(figures) if args.json else _as_table(figures))
    return 0


def _measure(name: str, args: argparse.Namespace) -> TransferFigures:
    from ..kvtransfer.transfer_bench import measure_transport

    try:
        return measure_transport(name, args.tokens, args.rounds, _say)
    except RuntimeError as err:
        raise CliError(f"{name}: {err}") from err


def _as_json(figures: list[TransferFigures]) -> str:
    import msgspec

    return json.dumps([msgspec.to_builtins(item) for item in figures], indent=1)


def _as_table(figures: list[TransferFigures]) -> str:
    header = (
        "TRANSPORT",
        "GB/s",
        "MEMCPY",
        "SHARE",
        "64 SHORT, GB/s",
        "ONE BLOCK, µs",
        "CPU s/GB",
        "DIGESTS",
        "PLAIN SOCKET",
    )
    rows = [
        (
            item.transport,
            f"{item.gbps:.2f}",
            f"{item.memcpy_gbps:.2f}",
            f"{item.share_of_memcpy:.0%}",
            f"{item.many_gbps:.2f}",
            f"{item.latency_us:.0f}",
            f"{item.cpu_s_per_gb:.2f}",
            f"{item.digest_cost:+.0%}",
            f"{item.plain_socket_gbps:.2f}" if item.plain_socket_gbps else "-",
        )
        for item in figures
    ]
    return table([header, *rows], right=frozenset(range(1, 9)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
