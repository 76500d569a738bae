"""The tables of docs/ROUTING.md: policies on cells, in virtual time: `python benchmarks/routing.py --data DIR`.

A cell is a part of a trace, a speed, a cluster. Cells marked `tuned` use requests that `auto` was tuned on; the others
were kept back. `--redraw` draws the gaps between requests anew (exponential, the trace's mean), so a seed is another
run of the same load; without it requests come when the trace says.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from penstock.cli.simulate import parse_shape
from penstock.simulator.costs import MODELS
from penstock.simulator.report import Summary, Targets
from penstock.simulator.runs import POLICIES, simulate
from penstock.simulator.trace import TraceRequest, load_trace

TRACES = {
    "conversation": "mooncake/conversation_trace.jsonl.gz",
    "synthetic": "mooncake/synthetic_trace.jsonl.gz",
    "azure-conv": "azure-llm-2023/AzureLLMInferenceTrace_conv.csv.gz",
    "azure-code": "azure-llm-2023/AzureLLMInferenceTrace_code.csv.gz",
}
COLOCATED = ("auto", "kv-overlap", "least-loaded")  # the others only differ in how they choose a prefill worker
TARGETS = Targets(30.0, 0.1)


@dataclass(frozen=True)
class Cell:
    """`shapes`: the split cluster, then the colocated one of the same size."""

    trace: str
    start: int
    stop: int
    rate: float
    shapes: tuple[str, str]
    model: str = "70b"
    is_tuned: bool = False

    @property
    def name(self) -> str:
        return f"{self.trace}-{self.start}-{self.stop}-x{self.rate:g}-{self.shapes[0]}-{self.model}"


CELLS = [
    Cell("conversation", 0, 6000, 1.5, ("8P+8D", "16B"), is_tuned=True),
    Cell("synthetic", 0, 3993, 1.5, ("8P+8D", "16B"), is_tuned=True),
    Cell("conversation", 6000, 12031, 1.5, ("8P+8D", "16B")),
    Cell("conversation", 6000, 12031, 3.0, ("16P+16D", "32B")),
    Cell("conversation", 6000, 12031, 6.0, ("32P+32D", "64B")),
    Cell("conversation", 8000, 12031, 0.3, ("8P+8D", "16B")),
    Cell("conversation", 8000, 12031, 1.5, ("4P+12D", "16B")),
    Cell("synthetic", 0, 3993, 3.0, ("16P+16D", "32B")),
    Cell("synthetic", 0, 3993, 6.0, ("32P+32D", "64B")),
    Cell("azure-conv", 0, 6000, 8.0, ("8P+8D", "16B")),
    Cell("azure-conv", 0, 6000, 32.0, ("32P+32D", "64B")),
    Cell("azure-code", 0, 6000, 6.0, ("8P+8D", "16B")),
    Cell("azure-code", 0, 6000, 24.0, ("32P+32D", "64B")),
    Cell("azure-conv", 0, 6000, 4.0, ("2P+2D", "4B"), model="8b"),
    Cell("azure-code", 0, 6000, 4.0, ("2P+2D", "4B"), model="8b-slow-link"),
]


def requests_of(cell: Cell, data: Path, redraw: int | None) -> list[TraceRequest]:
    """The cell's part of the trace, from 0 on."""
    part = load_trace(data / TRACES[cell.trace])[cell.start : cell.stop]
    first = part[0].arrival_s
    part = [replace(request, arrival_s=(request.arrival_s - first) / cell.rate) for request in part]
    if redraw is None:
        return part
    draw, now, mean = random.Random(redraw), 0.0, part[-1].arrival_s / len(part)
    drawn = []
    for request in part:
        now += draw.expovariate(1 / mean)
        drawn.append(replace(request, arrival_s=now))
    return drawn


def run_cell(cell: Cell, trace: list[TraceRequest], policies: list[str], seed: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for shape, policy in [(shape, policy) for shape in cell.shapes for policy in policies]:
        if shape == cell.shapes[0] or policy in COLOCATED:
            begun = time.perf_counter()
            row = simulate(trace, policy, parse_shape(shape), MODELS[cell.model], TARGETS, seed)
            seconds = time.perf_counter() - begun
            print(f"{cell.name}: {_line(row)}  {seconds:.1f} s", file=sys.stderr, flush=True)
            rows.append({**row.to_dict(), "seconds": seconds})
    return rows


def _line(row: Summary) -> str:
    return (
        f"{row.shape:>8} {row.policy:>17} ttft {row.ttft_mean_s:7.3f} {row.ttft_p99_s:7.2f} "
        f"tpot {row.tpot_mean_s * 1e3:5.1f} {row.tpot_p99_s * 1e3:6.1f} good {row.goodput:8.4%} "
        f"local {row.local_rate:4.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with `mooncake` and `azure-llm-2023`")
    parser.add_argument("--only", default="", metavar="NAMES", help="only cells whose name contains one of these")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--redraw", type=int, metavar="SEED", help="draw the gaps between requests anew")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    outcome = []
    for cell in CELLS:
        if any(name in cell.name for name in args.only.split(",")):
            trace = requests_of(cell, args.data, args.redraw)
            rows = run_cell(cell, trace, args.policies.split(","), args.redraw or 0)
            outcome.append({"cell": asdict(cell), "redraw": args.redraw, "rows": rows})
    print(json.dumps(outcome, indent=1))


if __name__ == "__main__":
    main()
