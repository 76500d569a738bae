"""What this machine does with the real model, in about five minutes: `python benchmarks/quick.py [--threads N]`.

Two clusters, one disaggregated (1 prefill, 1 decode), one colocated (1 worker), stand side by side and are measured
in turn, request by request, so that a drift of the machine meets both. Prompts are random token ids of exact length,
never seen before (no prefix hits), greedy, end-of-text ignored; those of the decode rate were sent once, so that all
streams soon decode together. The client runs on the same cores and is part of what is measured.

    decode tok/s      tokens of all streams per second, while all of them decode
    prefill tok/s     prompt tokens / TTFT of a request for one token
    TTFT              request sent → first token, one request at a time, disaggregated and colocated by turns
    transfer share    the hand-off's part of the disaggregated TTFT, from the phases in the response
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from penstock import __version__
from penstock.testing.serving import Serving, serving

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS, DECODE_PROMPT_TOKENS, NEW_TOKENS = 128, 64, 256


@dataclass
class Stream:
    """Times of one streamed answer: when it was sent, and when each token came (seconds, monotonic)."""

    sent: float
    token_times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.sent


async def request(
    session: aiohttp.ClientSession, url: str, prompt: list[int], num_new: int, stream: Stream | None = None
) -> Stream:
    """The whole answer; a given `stream` is filled as it comes."""
    body = {
        "model": "smollm2-135m-instruct",
        "prompt": prompt,
        "max_tokens": num_new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    stream = stream or Stream(0.0)
    stream.sent = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                _note(stream, json.loads(line[6:]))
    return stream


def _note(stream: Stream, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        raise RuntimeError(chunk["error"])
    stream.usage = chunk.get("usage") or stream.usage
    stream.phases = chunk.get("penstock") or stream.phases
    now = time.perf_counter()
    stream.token_times += [now] * (int(stream.usage.get("completion_tokens", 0)) - len(stream.token_times))


class Client:
    """Sends prompts that were never sent before."""

    def __init__(self, session: aiohttp.ClientSession, seed: int) -> None:
        self._session, self._rng = session, random.Random(seed)

    async def run(self, cluster: Serving, num_streams: int, num_prompt: int, num_new: int) -> list[Stream]:
        return await self._send(cluster, self._prompts(num_streams, num_prompt), num_new)

    async def run_again(self, cluster: Serving, num_streams: int, num_prompt: int, num_new: int) -> list[Stream]:
        """The same with prompts that were sent once before."""
        prompts = self._prompts(num_streams, num_prompt)
        await self._send(cluster, prompts, 1)
        return await self._send(cluster, prompts, num_new)

    def _prompts(self, num_streams: int, num_prompt: int) -> list[list[int]]:
        return [[self._rng.randrange(1000, 40000) for _ in range(num_prompt)] for _ in range(num_streams)]

    async def _send(self, cluster: Serving, prompts: list[list[int]], num_new: int) -> list[Stream]:
        return await asyncio.gather(*(request(self._session, cluster.url, p, num_new) for p in prompts))


def decode_rate(streams: list[Stream]) -> float:
    """Tokens of all streams per second while all of them decode."""
    start, stop = max(s.token_times[0] for s in streams), min(s.token_times[-1] for s in streams)
    if stop <= start:
        raise RuntimeError("the first stream ended before the last began; raise NEW_TOKENS")
    return sum(start < t <= stop for s in streams for t in s.token_times) / (stop - start)


def transfer_share(stream: Stream) -> float:
    return float(stream.phases["transfer_ms"]) / 1000 / stream.ttft_s


async def measure(clusters: dict[str, Serving], repeats: int) -> dict[str, Any]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
        client = Client(session, seed=time.time_ns())
        for cluster in clusters.values():
            await client.run(cluster, 2, PROMPT_TOKENS, 16)
        results: dict[str, Any] = {name: {} for name in clusters}
        for num_streams in (1, 8, 32):
            await _measure_decode(client, clusters, results, num_streams, repeats)
        for num_prompt in (512, 2048):
            await _measure_prefill(client, clusters, results, num_prompt, 2 * repeats + 1)
        await _measure_ttft(client, clusters, results, 10 * repeats)
    return results


async def _measure_decode(
    client: Client, clusters: dict[str, Serving], results: dict[str, Any], num_streams: int, repeats: int
) -> None:
    rates: dict[str, list[float]] = {name: [] for name in clusters}
    for _ in range(repeats):
        for name, cluster in clusters.items():
            rates[name].append(
                decode_rate(await client.run_again(cluster, num_streams, DECODE_PROMPT_TOKENS, NEW_TOKENS))
            )
    for name in clusters:
        results[name][f"decode_tok_s_{num_streams}"] = _summary(rates[name])
        say(f"{name}: {num_streams} streams decode at {statistics.median(rates[name]):.0f} tok/s")


async def _measure_prefill(
    client: Client, clusters: dict[str, Serving], results: dict[str, Any], num_prompt: int, repeats: int
) -> None:
    rates: dict[str, list[float]] = {name: [] for name in clusters}
    for _ in range(repeats):
        for name, cluster in clusters.items():
            [stream] = await client.run(cluster, 1, num_prompt, 1)
            rates[name].append(num_prompt / stream.ttft_s)
    for name in clusters:
        results[name][f"prefill_tok_s_{num_prompt}"] = _summary(rates[name])
        say(f"{name}: prefill of {num_prompt} tokens at {statistics.median(rates[name]):.0f} tok/s")


async def _measure_ttft(client: Client, clusters: dict[str, Serving], results: dict[str, Any], repeats: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in clusters}
    shares: list[float] = []
    for _ in range(repeats):
        for name, cluster in clusters.items():
            [stream] = await client.run(cluster, 1, PROMPT_TOKENS, 2)
            times[name].append(stream.ttft_s * 1000)
            if name == "disaggregated":
                shares.append(transfer_share(stream))
    for name in clusters:
        results[name]["ttft_ms"] = _summary(times[name])
    ratios = [a / b for a, b in zip(times["disaggregated"], times["colocated"], strict=True)]
    results["ttft_ratio_disaggregated_to_colocated"] = _summary(ratios)
    results["transfer_share_of_ttft"] = _summary(shares)


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "n": len(values),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    import torch

    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "penstock": __version__,
    }


def commit() -> str:
    root = Path(__file__).parent.parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def _range(figure: dict[str, float], scale: float, digits: int) -> str:
    median, low, high = (scale * figure[name] for name in ("median", "min", "max"))
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def report(record: dict[str, Any]) -> str:
    """The figures as a Markdown table: median (min to max)."""
    results = record["results"]
    lines = ["| | disaggregated 1P+1D | colocated |", "|---|---|---|"]
    for key in results["disaggregated"]:
        cells = [_range(results[name][key], 1, 1) for name in ("disaggregated", "colocated")]
        lines.append(f"| {key} | {cells[0]} | {cells[1]} |")
    ratio, share = results["ttft_ratio_disaggregated_to_colocated"], results["transfer_share_of_ttft"]
    lines.append(f"\nTTFT at concurrency 1, disaggregated / colocated: {_range(ratio, 1, 3)}")
    lines.append(f"transfer share of TTFT in %: {_range(share, 100, 1)}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="auto", help="weights and KV cache (default: auto)")
    parser.add_argument("--threads", type=int, default=None, help="compute threads (default: penstock serve's)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each figure (default: 2)")
    parser.add_argument("--no-save", action="store_true", help="do not write benchmarks/results/")
    args = parser.parse_args()
    options = ["--dtype", args.dtype, *(["--threads", str(args.threads)] if args.threads else [])]
    with ExitStack() as stack:
        clusters = {
            "disaggregated": stack.enter_context(serving(*options)),
            "colocated": stack.enter_context(serving("--colocated", *options)),
        }
        results = asyncio.run(measure(clusters, args.repeats))
    now = datetime.now(UTC)
    record: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "options": options,
        "results": results,
    }
    print(report(record))
    if not args.no_save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{now:%Y-%m-%d}-{record['commit']}-{record['machine']['cores']}core.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        say(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
