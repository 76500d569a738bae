"""What three times too much does to a cluster: `python benchmarks/overload.py [--rate R] [--seconds 60] [--colocated]`.

One cluster with targets for every request (`router.refuse_late: always`) and an open loop of requests at random times
from one client on the same machine. First the peak: the rate grows by a quarter from step to step until goodput has
stopped growing, unless `--rate` names it. Then `--factor` times that rate for `--seconds`. With `--without`, the same
overload meets a cluster that refuses nothing (`never`), for comparison.

    goodput           requests that kept both targets, per second, of those intended within the time
    share of peak     under overload / the best step; it should stay above 0.95
    refusal           intended time → the last byte of the 429; p99 should stay below 50 ms
    router RSS        resident memory of the process with router and gateway, before and after; it should stay flat
    client lag        how late the client itself was; a run with a p99 above 50 ms says little about refusals

Prompts are random token ids that were never sent before, greedy, end-of-text ignored.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import aiohttp

from penstock.benchmarks.quick import RESULTS, commit, machine
from penstock.core.quantiles import quantile
from penstock.testing.serving import Serving, serving

GROWTH = 1.25
MAX_STEPS = 16
SETTLE_S = 2.0  # between runs, for what still runs to end
MIN_RETRY_AFTER = 1

TOPOLOGY = """
prefill: { replicas: 1, kv_cache_bytes: 536870912 }
decode: { replicas: 1, kv_cache_bytes: 536870912 }
colocated: COLOCATED
router: { policy: auto, refuse_late: REFUSE, target_ttft_s: TTFT, target_tpot_s: TPOT }
"""


@dataclass(frozen=True)
class Plan:
    """Lengths are drawn evenly between the two bounds. Seconds, tokens."""

    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    ttft_s: float
    tpot_s: float


@dataclass
class Answer:
    """One request, seconds from the start of its run."""

    intended_s: float
    sent_s: float
    status: int = 0
    retry_after: str = ""
    code: str = ""
    first_s: float = 0.0
    last_s: float = 0.0
    end_s: float = 0.0
    num_tokens: int = 0

    def is_good(self, plan: Plan) -> bool:
        if self.status != 200 or self.code or not self.num_tokens:
            return False
        tpot_s = (self.last_s - self.first_s) / max(1, self.num_tokens - 1)
        return self.first_s - self.intended_s <= plan.ttft_s and tpot_s <= plan.tpot_s


class Load:
    """Sends requests to one cluster, whatever it says to them."""

    def __init__(self, cluster: Serving, plan: Plan, seed: int) -> None:
        self.plan = plan
        self._url = f"{cluster.url}/v1/completions"
        self._rng = random.Random(seed)
        self._model: str = cluster.get("/v1/models")["data"][0]["id"]

    async def open_loop(self, rate: float, seconds: float) -> list[Answer]:
        """Requests at random times (Poisson) for so long; returns when all have ended."""
        times, now = [], self._rng.expovariate(rate)
        while now < seconds:
            times.append(now)
            now += self._rng.expovariate(rate)
        bodies = [self._body() for _ in times]
        async with self._session() as session:
            start = time.perf_counter()
            tasks = []
            for intended_s, body in zip(times, bodies, strict=True):
                await asyncio.sleep(max(0.0, start + intended_s - time.perf_counter()))
                tasks.append(asyncio.create_task(self._send(session, body, intended_s, start)))
            return list(await asyncio.gather(*tasks))

    async def one_by_one(self, count: int) -> None:
        """So that the router's model has seen what things cost."""
        async with self._session() as session:
            for _ in range(count):
                await self._send(session, self._body(), 0.0, time.perf_counter())

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(600), read_bufsize=1 << 20
        )

    def _body(self) -> bytes:
        num_prompt = self._rng.randint(*self.plan.prompt_tokens)
        body = {
            "model": self._model,
            "prompt": [self._rng.randrange(1000, 40000) for _ in range(num_prompt)],
            "max_tokens": self._rng.randint(*self.plan.output_tokens),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        return json.dumps(body).encode()

    async def _send(self, session: aiohttp.ClientSession, body: bytes, intended_s: float, start: float) -> Answer:
        answer = Answer(intended_s, time.perf_counter() - start)
        headers = {"Content-Type": "application/json"}
        try:
            async with session.post(self._url, data=body, headers=headers) as response:
                answer.status = response.status
                answer.retry_after = response.headers.get("Retry-After", "")
                if response.status != 200:
                    answer.code = json.loads(await response.read())["error"]["code"]
                async for line in response.content:
                    _note(answer, line, time.perf_counter() - start)
        except (aiohttp.ClientError, OSError) as error:
            answer.code = type(error).__name__
        answer.end_s = time.perf_counter() - start
        return answer


def _note(answer: Answer, line: bytes, now: float) -> None:
    if not line.startswith(b"data: {"):
        return
    chunk = json.loads(line[6:])
    if "error" in chunk:
        answer.code = chunk["error"]["code"]
    num_tokens = int((chunk.get("usage") or {}).get("completion_tokens", 0))
    if num_tokens > answer.num_tokens:
        answer.first_s = answer.first_s or now
        answer.num_tokens, answer.last_s = num_tokens, now


def figures(answers: list[Answer], plan: Plan, rate: float, seconds: float) -> dict[str, Any]:
    refused = [answer for answer in answers if answer.status == 429]
    refusals_ms = [1e3 * (answer.end_s - answer.intended_s) for answer in refused]
    lags_ms = [1e3 * (answer.sent_s - answer.intended_s) for answer in answers]
    served = [answer for answer in answers if answer.status == 200 and not answer.code]
    return {
        "rate": round(rate, 3),
        "seconds": seconds,
        "sent": len(answers),
        "goodput": round(sum(answer.is_good(plan) for answer in answers) / seconds, 3),
        "served": len(served),
        "served_too_late": sum(not answer.is_good(plan) for answer in served),
        "refused": len(refused),
        "refusals_without_retry_after": sum(_wrong_retry_after(answer) for answer in refused),
        "refusal_ms": spread(refusals_ms),
        "other_ends": dict(Counter(a.code or str(a.status) for a in answers if a.status != 429 and a not in served)),
        "ttft_s": spread([answer.first_s - answer.intended_s for answer in served]),
        "client_lag_ms": spread(lags_ms),
    }


def _wrong_retry_after(answer: Answer) -> bool:
    return not answer.retry_after.isdigit() or int(answer.retry_after) < MIN_RETRY_AFTER


def spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {"n": 0}
    found = {f"p{round(100 * share)}": round(quantile(values, share), 3) for share in (0.5, 0.99)}
    return {**found, "max": round(max(values), 3), "n": len(values)}


def find_peak(load: Load, start_rate: float, seconds: float) -> list[dict[str, Any]]:
    """Steps of growing rate until goodput has not grown by 5 % in two of them."""
    steps: list[dict[str, Any]] = []
    rate, best, num_flat = start_rate, 0.0, 0
    while num_flat < 2 and len(steps) < MAX_STEPS:
        steps.append(run_step(load, rate, seconds))
        grown = steps[-1]["goodput"] > 1.05 * best
        best, num_flat = max(best, steps[-1]["goodput"]), 0 if grown else num_flat + 1
        rate *= GROWTH
    return steps


def run_step(load: Load, rate: float, seconds: float) -> dict[str, Any]:
    found = figures(asyncio.run(load.open_loop(rate, seconds)), load.plan, rate, seconds)
    print(json.dumps(found), file=sys.stderr, flush=True)
    time.sleep(SETTLE_S)
    return found


def router_rss_bytes(cluster: Serving) -> int:
    """Of the supervisor's one child that is no worker."""
    workers = {int(row["pid"]) for row in cluster.workers().values()}
    tasks = Path("/proc", str(cluster.process.pid), "task").glob("*/children")
    (router,) = {int(pid) for task in tasks for pid in task.read_text().split()} - workers
    fields = Path("/proc", str(router), "statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(args: argparse.Namespace, plan: Plan, refuse: str, rate: float) -> dict[str, Any]:
    """One cluster: warm-up, the peak where `rate` is 0, the overload."""
    topology = TOPOLOGY.replace("COLOCATED", str(args.colocated).lower()).replace("REFUSE", refuse)
    topology = topology.replace("TTFT", str(plan.ttft_s)).replace("TPOT", str(plan.tpot_s))
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(topology)
        file.flush()
        with serving("--topology", file.name) as cluster:
            load = Load(cluster, plan, args.seed)
            asyncio.run(load.one_by_one(args.warmup))
            if rate:
                steps = [run_step(load, rate, args.step_seconds)]
            else:
                steps = find_peak(load, args.start_rate, args.step_seconds)
            peak = max(steps, key=lambda step: float(step["goodput"]))
            before = router_rss_bytes(cluster)
            over = run_step(load, args.factor * peak["rate"], args.seconds)
            return {
                "refuse_late": refuse,
                "steps": steps,
                "peak": peak,
                "overload": over,
                "share_of_peak": round(over["goodput"] / peak["goodput"], 4) if peak["goodput"] else None,
                "router_rss_bytes": {"before": before, "after": router_rss_bytes(cluster)},
                "classes": cluster.get("/status")["classes"],
            }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=0.0, help="peak rate, requests/s; 0: search for it (default)")
    parser.add_argument("--start-rate", type=float, default=1.0, help="first step of the search (default 1)")
    parser.add_argument("--factor", type=float, default=3.0, help="overload as a multiple of the peak (default 3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload (default 60)")
    parser.add_argument("--step-seconds", type=float, default=20.0, help="of each step before it (default 20)")
    parser.add_argument("--warmup", type=int, default=24, help="requests one by one at first (default 24)")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(64, 512), metavar=("LEAST", "MOST"))
    parser.add_argument("--output-tokens", type=int, nargs=2, default=(16, 64), metavar=("LEAST", "MOST"))
    parser.add_argument("--target-ttft", type=float, default=2.0, help="seconds (default 2)")
    parser.add_argument("--target-tpot", type=float, default=0.1, help="seconds (default 0.1)")
    parser.add_argument("--colocated", action="store_true", help="one worker of both roles instead of 1 + 1")
    parser.add_argument("--without", action="store_true", help="the same overload on a cluster that refuses nothing")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-save", action="store_true", help="write no file under benchmarks/results")
    return parser.parse_args()


def main() -> int:
    args = parse()
    plan = Plan(tuple(args.prompt_tokens), tuple(args.output_tokens), args.target_ttft, args.target_tpot)
    load = os.getloadavg()
    results = [measure(args, plan, "always", args.rate)]
    if args.without:
        results.append(measure(args, plan, "never", results[0]["peak"]["rate"]))
    now = datetime.now(UTC)
    record: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine() | {"load_before": [round(value, 1) for value in load]},
        "topology": TOPOLOGY,
        "options": sys.argv[1:],
        "results": results,
    }
    print(json.dumps(record, indent=1))
    if not args.no_save:
        RESULTS.mkdir(exist_ok=True)
        shape = "colocated" if args.colocated else "1p1d"
        name = f"{now:%Y-%m-%d}-{record['commit']}-overload-{shape}-{record['machine']['cores']}core.json"
        (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {RESULTS / name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
