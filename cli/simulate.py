"""`penstock simulate`: a request trace over the real router and simulated workers, a row for each policy and shape."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Commands, add_command, number, whole_number
from .errors import CliError
from .terminal import table

if TYPE_CHECKING:
    from ..simulator.cluster import Shape
    from ..simulator.report import Summary

_SHAPE = re.compile(r"(?:(\d{1,4})P\+(\d{1,4})D|(\d{1,4})B)")
_HEADER = (
    "WORKERS", "POLICY", "TTFT MEAN", "P50", "P99", "TPOT MEAN", "P99", "GOODPUT", "PREFIX HITS", "LOCAL", "FORECAST ±",
    "CHANGES",
)  # fmt: skip


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "simulate",
        run,
        "Compare routing policies and ratios of workers on a request trace.",
        "The router is the real one; workers are modelled by given costs on virtual time, so a cluster of hundreds "
        "fits on a laptop and every run with the same arguments gives the same figures.",
        "penstock simulate conversation_trace.jsonl.gz --workers 8P+8D,16B --policy auto,least-loaded,mooncake",
    )
    parser.add_argument(
        "trace",
        metavar="TRACE",
        help="a Mooncake JSON-lines or Azure CSV file, gzipped or not; or `shift`: a generated load that turns from "
        "long prompts to long answers half way",
    )
    parser.add_argument(
        "--workers",
        default="8P+8D",
        metavar="SHAPES",
        help="prefill and decode workers (8P+8D) or colocated ones (16B); several by commas (default: 8P+8D)",
    )
    parser.add_argument(
        "--policy",
        default="auto,least-loaded",
        metavar="NAMES",
        help="policies, separated by commas: those of `penstock serve --policy`, or another system's rule (sglang, "
        "dynamo, mooncake); `all` for all (default: auto,least-loaded)",
    )
    parser.add_argument("--model", default="70b", metavar="NAME", help="costs: 70b, 8b, 8b-slow-link (default: 70b)")
    parser.add_argument("--rate", type=number(1e-3, 1e4), default=1.0, metavar="X", help="replay X times as fast")
    parser.add_argument("--limit", type=whole_number(1, 10**9), metavar="N", help="only the first N requests")
    parser.add_argument(
        "--ttft", type=number(1e-3, 1e6), default=30.0, metavar="S", help="target, seconds (default: 30)"
    )
    parser.add_argument(
        "--tpot", type=number(1e-6, 1e6), default=0.1, metavar="S", help="target, seconds (default: 0.1)"
    )
    parser.add_argument(
        "--shared-cores",
        type=number(1.0, 100.0),
        default=1.0,
        metavar="X",
        help="the first prefill and the first decode worker run on the same cores, and so on: each takes X times as "
        "long while both compute; 2 where neither gains by the other (default: 1, none share)",
    )
    parser.add_argument(
        "--balance-roles",
        action="store_true",
        help="run each shape once more with the planner, which changes the roles of its workers",
    )
    parser.add_argument(
        "--parts", type=whole_number(1, 100), default=1, metavar="N", help="also a row for each Nth of the trace's time"
    )
    parser.add_argument("--seed", type=whole_number(0, 2**31), default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of rows, times in seconds")


def run(args: argparse.Namespace) -> int:
    from ..core.logging import setup_logging
    from ..simulator.costs import MODELS
    from ..simulator.report import Targets
    from ..simulator.runs import POLICIES, simulate_parts
    from ..simulator.shifting import NAME, shifting_trace
    from ..simulator.trace import load_trace, shape_trace

    shapes = [parse_shape(text) for text in args.workers.split(",")]
    policies = list(POLICIES) if args.policy == "all" else args.policy.split(",")
    for name, known in [(args.model, tuple(MODELS)), *((policy, POLICIES) for policy in policies)]:
        if name not in known:
            raise CliError(f"{name!r} is not known", f"choose from {', '.join(known)}")
    setup_logging("simulate", "warning")
    requests = shifting_trace(args.seed) if args.trace == NAME else load_trace(Path(args.trace))
    trace = shape_trace(requests, args.rate, args.limit)
    costs, targets, rows = MODELS[args.model], Targets(args.ttft, args.tpot), []
    for shape in shapes:
        for policy in policies:
            for is_balanced in (False, True) if args.balance_roles else (False,):
                print(f"{shape}, {policy}: {len(trace)} requests", file=sys.stderr)
                rows += simulate_parts(
                    trace,
                    policy,
                    shape,
                    costs,
                    targets,
                    args.seed,
                    args.parts,
                    args.shared_cores,
                    balance_roles=is_balanced,
                )
    print(json.dumps([row.to_dict() for row in rows], indent=2) if args.json else format_rows(rows))
    return 0


def parse_shape(text: str) -> Shape:
    """`8P+8D` or `16B`; raises CliError."""
    from ..simulator.cluster import Shape

    found = _SHAPE.fullmatch(text.strip())
    numbers = [int(part or 0) for part in found.groups()] if found else []
    if not numbers or not numbers[1] + numbers[2]:
        raise CliError(f"workers {text!r} is no shape of a cluster", "write 8P+8D or 16B, with at least one D or B")
    return Shape(*numbers)


def format_rows(rows: list[Summary]) -> str:
    """The table for people."""
    cells = [_HEADER, *(_cells(row) for row in rows)]
    return table(cells, right=frozenset(range(2, len(_HEADER))))


def _cells(row: Summary) -> tuple[str, ...]:
    return (
        row.shape,
        row.policy,
        f"{row.ttft_mean_s:.2f} s",
        f"{row.ttft_p50_s:.2f} s",
        f"{row.ttft_p99_s:.2f} s",
        f"{row.tpot_mean_s * 1e3:.1f} ms",
        f"{row.tpot_p99_s * 1e3:.1f} ms",
        f"{row.goodput:.2%}",
        f"{row.hit_rate:.1%}",
        f"{row.local_rate:.0%}",
        f"{row.ttft_forecast_error:.1%}",
        str(row.num_role_changes),
    )
