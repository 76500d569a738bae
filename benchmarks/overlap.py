"""Does the hand-off hide behind prefill? A prompt over a real cluster, layer by layer: `python benchmarks/overlap.py`.

Starts `penstock serve` with one prefill and one decode worker at log level debug, sends prompts one at a time, and lays
what both workers wrote side by side: when prefill had computed each group of layers, and when decode had them verified.

    hidden       share of the pushed layers that were at decode before prefill had computed its last layer
    tail         last layer computed → last push verified at decode
    transfer     the hand-off's part of TTFT, from the phases in the response
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
from dataclasses import dataclass
from typing import Any

from penstock.testing.serving import Serving, serving

_TIME = r"^(\d+):(\d+):([\d.]+) \w+ +"
COMPUTED = re.compile(_TIME + r"prefill-0 (\d+) layers computed")
ARRIVED = re.compile(_TIME + r"decode-0 layers (\d+) to (\d+) of (\d+) blocks from (\d+) on are here")


@dataclass
class Trace:
    """One prompt. Times in seconds of the day; a push is (time, first layer, stop layer, blocks, first block)."""

    computed: list[tuple[float, int]]
    pushes: list[tuple[float, int, int, int, int]]
    phases: dict[str, Any]

    @property
    def end(self) -> float:
        return self.computed[-1][0]

    @property
    def hidden(self) -> float:
        """Share of (block, layer) pairs that were at decode before the last layer was computed."""
        weights = [(moment <= self.end, (stop - first) * blocks) for moment, first, stop, blocks, _ in self.pushes]
        return sum(weight for is_early, weight in weights if is_early) / sum(weight for _, weight in weights)

    @property
    def tail_ms(self) -> float:
        return max(0.0, 1000 * (self.pushes[-1][0] - self.end))

    @property
    def share(self) -> float:
        return float(self.phases["transfer_ms"]) / float(self.phases["ttft_ms"])


def read_trace(text: str, phases: dict[str, Any]) -> Trace:
    trace = Trace([], [], phases)
    for line in text.splitlines():
        if found := COMPUTED.match(line):
            trace.computed.append((_moment(found), int(found[4])))
        elif found := ARRIVED.match(line):
            first, stop, count, block = (int(found[at]) for at in range(4, 8))
            trace.pushes.append((_moment(found), first, stop, count, block))
    return trace


def _moment(found: re.Match[str]) -> float:
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])


def one(cluster: Serving, rng: random.Random, num_tokens: int) -> Trace:
    before = cluster.log.stat().st_size
    prompt = [rng.randrange(1000, 40000) for _ in range(num_tokens)]
    body = {"model": "smollm2-135m-instruct", "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    answer = cluster.post("/v1/completions", body)
    with cluster.log.open("rb") as log:
        log.seek(before)
        return read_trace(log.read().decode(errors="replace"), answer["penstock"])


def story(trace: Trace) -> str:
    """The prompt's hand-off in lines: time since the first layer, what was computed, what had arrived."""
    start = trace.computed[0][0]
    events = [(moment, f"prefill has computed {n} layers of its chunk") for moment, n in trace.computed if n % 5 == 0]
    events += [
        (moment, f"    decode has layers {first} to {stop} of blocks {block} to {block + count}")
        for moment, first, stop, count, block in trace.pushes
    ]
    return "\n".join(f"{1000 * (moment - start):8.0f} ms  {text}" for moment, text in sorted(events))


def summary(length: int, traces: list[Trace]) -> dict[str, Any]:
    def median(values: list[float], digits: int) -> float:
        return round(statistics.median(values), digits)

    return {
        "tokens": length,
        "ttft_ms": median([float(t.phases["ttft_ms"]) for t in traces], 1),
        "transfer_ms": median([float(t.phases["transfer_ms"]) for t in traces], 2),
        "transfer_share": median([t.share for t in traces], 4),
        "hidden": median([t.hidden for t in traces], 3),
        "tail_ms": median([t.tail_ms for t in traces], 2),
        "pushes": len(traces[-1].pushes),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="128,512,2048", help="prompt lengths (default: 128,512,2048)")
    parser.add_argument("--rounds", type=int, default=7, help="prompts of each length (default: 7)")
    parser.add_argument("--transport", default="auto", help="how blocks move (default: auto)")
    parser.add_argument("--story", action="store_true", help="tell the last prompt layer by layer, on stderr")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    rng, rows = random.Random(1), []
    with serving("--log-level", "debug", "--transport", args.transport) as cluster:
        one(cluster, rng, 64)
        for length in map(int, args.lengths.split(",")):
            traces = [one(cluster, rng, length) for _ in range(args.rounds)]
            rows.append(summary(length, traces))
            print(rows[-1], file=sys.stderr, flush=True)
            if args.story:
                print(story(traces[-1]), file=sys.stderr)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
