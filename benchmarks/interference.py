"""What a long prompt does to streams that run: `python benchmarks/interference.py [--peer NAME=URL ...]`.

`--streams` answers are decoded; after a while of quiet a prompt of `--prompt-tokens` tokens comes for one token, and
later the next. Gaps between the tokens of the streams (ITL) are those of quiet moments or those that overlap a long
prompt's prefill, from its sending to its first token. Systems stand side by side and take turns, `--rounds` times.

    apart        one prefill and one decode worker, always handed over
    colocated    one worker that prefills and decodes; both without speculation, so that each event is one token
    peers        other OpenAI-compatible servers that run already

Prompts are random token ids that no cache knows. The client runs on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from penstock.benchmarks.quick import RESULTS, Stream, commit, machine, request
from penstock.loadtest.statistics import percentile
from penstock.testing.serving import side_by_side

SYSTEMS = {
    "apart": "{ router: { disaggregate: always }, speculation: { method: 'off' } }",
    "colocated": "{ colocated: true, decode: { replicas: 1 }, speculation: { method: 'off' } }",
}
QUIET_S = 4.0
STREAM_PROMPT_TOKENS, STREAM_NEW_TOKENS = 64, 6000


@dataclass(frozen=True, slots=True)
class Round:
    """Gaps between tokens of all streams (seconds), and how long each long prompt took to its first token."""

    quiet: list[float]
    disturbed: list[float]
    long_ttft: list[float]


async def one_round(session: aiohttp.ClientSession, url: str, args: argparse.Namespace, rng: random.Random) -> Round:
    """The streams are cut off when the long prompts are done."""
    streams = [Stream(0.0) for _ in range(args.streams)]
    tasks = [
        asyncio.create_task(request(session, url, _prompt(rng, STREAM_PROMPT_TOKENS), STREAM_NEW_TOKENS, stream))
        for stream in streams
    ]
    try:
        await _until_all_run(streams, tasks)
        started = time.perf_counter()
        await asyncio.sleep(QUIET_S)
        spans = []
        for _ in range(args.prompts):
            long = await request(session, url, _prompt(rng, args.prompt_tokens), 1)
            spans.append((long.sent, long.token_times[0]))
            await asyncio.sleep(QUIET_S / 2)
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    broken = [end for end in ends if not isinstance(end, asyncio.CancelledError)]
    if broken:
        raise RuntimeError(f"{len(broken)} streams ended before the long prompts did: {broken[0]!r}")
    return sort_gaps(streams, started, spans)


def sort_gaps(streams: list[Stream], started: float, spans: list[tuple[float, float]]) -> Round:
    """A gap that overlaps a span is disturbed; events that bring several tokens count once."""
    quiet: list[float] = []
    disturbed: list[float] = []
    for stream in streams:
        times = sorted(set(stream.token_times))
        for before, after in pairwise(times):
            if before < started:
                continue
            is_disturbed = any(before < stop and after > start for start, stop in spans)
            (disturbed if is_disturbed else quiet).append(after - before)
    return Round(quiet, disturbed, [stop - start for start, stop in spans])


async def _until_all_run(streams: list[Stream], tasks: list[asyncio.Task[Stream]]) -> None:
    while not all(len(stream.token_times) > 4 for stream in streams):
        for task in tasks:
            if task.done():
                task.result()
                raise RuntimeError("a stream ended before the others began")
        await asyncio.sleep(0.05)


def _prompt(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(1000, 40000) for _ in range(num_tokens)]


def figures(rounds: list[Round]) -> dict[str, Any]:
    """Medians over the rounds of each round's figure, in ms."""

    def ms(of: Callable[[Round], float]) -> float:
        return round(statistics.median(of(one) for one in rounds) * 1e3, 2)

    found = {
        "itl_p99_quiet_ms": ms(lambda r: percentile(sorted(r.quiet), 99)),
        "itl_p99_disturbed_ms": ms(lambda r: percentile(sorted(r.disturbed), 99)),
        "itl_p50_quiet_ms": ms(lambda r: percentile(sorted(r.quiet), 50)),
        "itl_p50_disturbed_ms": ms(lambda r: percentile(sorted(r.disturbed), 50)),
        "longest_gap_ms": ms(lambda r: max(r.disturbed)),
        "long_ttft_ms": ms(lambda r: statistics.median(r.long_ttft)),
    }
    ratios = [percentile(sorted(r.disturbed), 99) / percentile(sorted(r.quiet), 99) for r in rounds]
    return found | {
        "p99_ratio": round(statistics.median(ratios), 2),
        "p99_ratios": [round(ratio, 2) for ratio in ratios],
        "gaps": [sum(len(r.quiet) for r in rounds), sum(len(r.disturbed) for r in rounds)],
    }


async def measure(urls: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(time.time_ns() if args.seed is None else args.seed)
    rounds: dict[str, list[Round]] = {name: [] for name in urls}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
        for url in urls.values():
            await request(session, url, _prompt(rng, args.prompt_tokens), 16)
        for _ in range(args.rounds):
            for name, url in urls.items():
                rounds[name].append(await one_round(session, url, args, rng))
                print(f"{name} {json.dumps(figures(rounds[name][-1:]))}", file=sys.stderr, flush=True)
    return {name: figures(found) for name, found in rounds.items()}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="a server that runs already")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=6000)
    parser.add_argument("--prompts", type=int, default=2, help="long ones in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, help="of the prompts; another for each run, or caches know them")
    parser.add_argument("--json", type=Path, default=RESULTS / "interference.json")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    topologies = {name: SYSTEMS[name] for name in args.systems}
    with side_by_side(topologies) as urls:
        for peer in args.peer:
            name, _, url = peer.partition("=")
            urls[name] = url
        found = asyncio.run(measure(urls, args))
    result = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "settings": {name: str(value) for name, value in vars(args).items() if name != "json"},
        "topologies": topologies,
        "figures": found,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
