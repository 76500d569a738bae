"""Goodput under mixed load: `python benchmarks/mixed_load.py --data DIR [--peer NAME=URL ...]`.

Long prompts among chats, in the shapes of a real service: nine requests of ten have the lengths of Azure's
conversations (2023), scaled to the model's window, the tenth those of its code requests, unscaled. Arrivals are
Poisson, prompts random token ids that no cache knows, answers of exactly the planned length. Systems stand side by
side and are loaded by turns, rate by rate from the lowest; the order turns with each rate. A system is done when it
has missed twice in a row. A rate is met when `--share` of the requests sent keep both targets.

    colocated    one worker that prefills and decodes, every core
    fixed        one prefill and one decode worker, always handed over
    auto         one prefill and one decode worker, the router's policy `auto`
    peers        other OpenAI-compatible servers that run already, at their own settings

The client runs on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from penstock.benchmarks.quick import RESULTS, commit, machine
from penstock.core.clock import MonotonicClock
from penstock.loadtest.bench import Bench, Choice, Run, Server
from penstock.loadtest.choices import ArrivalChoice, WorkloadChoice
from penstock.loadtest.client import Client
from penstock.loadtest.metrics import Targets
from penstock.loadtest.sending import RequestForm
from penstock.loadtest.statistics import Distribution
from penstock.testing.serving import side_by_side

SYSTEMS = {
    "colocated": "{ colocated: true, decode: { replicas: 1 } }",
    "fixed": "{ router: { policy: prefix-affinity, disaggregate: always } }",
    "auto": "{ router: { policy: auto } }",
}
CHAT_SCALE = 0.4
SHARE_OF_LONG = 0.1
MAX_MISSES = 2


@dataclass
class Curve:
    """What a system kept at each rate."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    misses: int = 0

    def best(self) -> float:
        """The highest rate met of those below the first that was missed twice in a row; 0: none."""
        return max((run["rate"] for run in self.runs if run["is_met"]), default=0.0)


def lengths(data: Path, count: int, seed: int) -> list[tuple[int, int]]:
    """(prompt, answer) tokens of the mix, drawn by `seed`."""
    folder, rng = data / "azure-llm-2023", random.Random(seed)
    chats = _rows(folder / "AzureLLMInferenceTrace_conv.csv.gz")
    long = _rows(folder / "AzureLLMInferenceTrace_code.csv.gz")
    found = []
    for _ in range(count):
        is_long = rng.random() < SHARE_OF_LONG
        prompt, answer = rng.choice(long if is_long else chats)
        scale = 1.0 if is_long else CHAT_SCALE
        found.append((max(1, round(prompt * scale)), max(1, round(answer * scale))))
    return found


def _rows(path: Path) -> list[tuple[int, int]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]


@contextmanager
def lengths_file(rows: list[tuple[int, int]]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="penstock-mixed-") as folder:
        path = Path(folder) / "lengths.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("num_prefill_tokens", "num_decode_tokens"))
            writer.writerows(rows)
        yield path


async def measure(urls: dict[str, str], path: Path, args: argparse.Namespace) -> dict[str, Curve]:
    clock = MonotonicClock()
    bench = Bench(clock)
    curves = {name: Curve() for name in urls}
    targets = Targets(args.ttft_ms / 1e3, args.tpot_ms / 1e3, None)
    for number, rate in enumerate(args.rates):
        turn = list(urls)[number % len(urls) :] + list(urls)[: number % len(urls)]
        for name in turn:
            curve = curves[name]
            if curve.misses >= MAX_MISSES:
                continue
            count = max(args.least_requests, round(rate * args.seconds))
            choice = Choice(
                WorkloadChoice("lengths", path, count),
                ArrivalChoice("poisson", rate),
                RequestForm(args.model, "completions", True),
                targets,
                seed=args.seed + number,
            )
            async with Client(urls[name], clock, None, 600.0) as client:
                server = await Server.meet(client, choice)
                run = await bench.run(server, server.workload(), choice.arrivals, salt=args.salt + number)
            curve.runs.append(figures(rate, run, args.share))
            curve.misses = 0 if curve.runs[-1]["is_met"] else curve.misses + 1
            print(f"{name} {json.dumps(curve.runs[-1])}", file=sys.stderr, flush=True)
    return curves


def figures(rate: float, run: Run, share: float) -> dict[str, Any]:
    summary = run.summary
    attained = summary.goodput.attainment if summary.goodput else 0.0
    latencies = summary.latencies
    return {
        "rate": rate,
        "sent": summary.sent,
        "errors": summary.errors,
        "attainment": round(attained, 4),
        "is_met": attained >= share and summary.is_valid,
        "is_valid": summary.is_valid,
        "ttft_ms": _quantiles(latencies.ttft),
        "tpot_ms": _quantiles(latencies.tpot),
        "output_tok_s": round(summary.throughput.output_tok_s, 1),
    }


def _quantiles(times: Distribution) -> dict[str, float]:
    return {f"p{q}": round(times.percentiles[q] * 1e3, 1) for q in (50, 90, 99)}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds azure-llm-2023/")
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="a server that runs already")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what all servers call the model")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.5, 0.7, 1.0, 1.4, 2.0, 2.8], help="requests/s, rising"
    )
    parser.add_argument("--seconds", type=float, default=45.0, help="of arrivals at each rate")
    parser.add_argument("--least-requests", type=int, default=40)
    parser.add_argument("--ttft-ms", type=float, default=2000.0)
    parser.add_argument("--tpot-ms", type=float, default=60.0)
    parser.add_argument("--share", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--salt", type=int, default=0, help="another number: other words, which no cache knows")
    parser.add_argument("--json", type=Path, default=RESULTS / "mixed_load.json")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    topologies = {name: SYSTEMS[name] for name in args.systems}
    most = max(args.least_requests, round(max(args.rates) * args.seconds))
    with (
        lengths_file(lengths(args.data, most, args.seed)) as path,
        side_by_side(topologies) as urls,
    ):
        for peer in args.peer:
            name, _, url = peer.partition("=")
            urls[name] = url
        curves = asyncio.run(measure(urls, path, args))
    result = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "settings": {name: str(value) for name, value in vars(args).items() if name not in ("data", "json")},
        "topologies": topologies,
        "goodput_rate": {name: curve.best() for name, curve in curves.items()},
        "curves": {name: curve.runs for name, curve in curves.items()},
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["goodput_rate"]))


if __name__ == "__main__":
    main()
