"""What one decision of the router costs: `python benchmarks/decisions.py` prints JSON, times in microseconds.

A cluster of so many workers in the state that many requests leave behind (queues, streams, blocks, an index full of
prefixes), and prompts of which half begin with one of a few long prefixes. Each decision is timed by itself:

    hash        the prompt's hashes, from its bytes
    decide      `Placer.place` without them: filters, matches, the choice, the forecast
    decision    both, as it is for a new request
    note        the books of the index after it (`note_dispatch`)
    check       the door: the prompt's ids packed and checked, before any decision
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from penstock.core.ids import AttemptKey, WorkerKey
from penstock.core.quantiles import quantile
from penstock.protocol.messages import Fingerprint, Heartbeat, Hello, Role, WorkerLoad
from penstock.protocol.sampling import SamplingParams
from penstock.router.config import RouterConfig
from penstock.router.cost_model import CostModel
from penstock.router.interface import GenerateRequest
from penstock.router.placement import Placement, Placer
from penstock.router.registry import Registry, WorkerRecord
from penstock.router.requests import RequestRecord, check_request
from penstock.simulator.costs import MODELS

BLOCK_SIZE = 16
NUM_PREFIXES = 24
SHARE = 0.5  # of the prompts that begin with a known prefix, for half to nearly all of their length


class Cluster(NamedTuple):
    placer: Placer
    workers: list[WorkerRecord]
    rng: random.Random


def make_cluster(num_prefill: int, num_decode: int, num_both: int, policy: str, seed: int) -> Cluster:
    """Workers that are ready, linked, and loaded at random."""
    rng, registry = random.Random(seed), Registry()
    counts: list[tuple[Role, int]] = [("prefill", num_prefill), ("decode", num_decode), ("both", num_both)]
    roles = [(role, number) for role, count in counts for number in range(count)]
    workers = [_join(registry, role, number) for role, number in roles]
    sources = [(w.key.worker_id, w.key.epoch, "tcp") for w in workers if w.can_prefill]
    for worker in workers:
        links = [link for link in sources if link[0] != worker.key.worker_id] if worker.can_decode else []
        worker.note_heartbeat(Heartbeat(1, "ready", WorkerLoad(), [], links), 0.0)
        _load(worker, rng)
    placer = Placer(RouterConfig(policy=policy), registry, f"{seed}")  # type: ignore[arg-type]
    _teach(placer.model, workers, rng)
    return Cluster(placer, workers, rng)


def _teach(model: CostModel, workers: list[WorkerRecord], rng: random.Random) -> None:
    """What a cluster that has run for a while knows of its costs."""
    costs = MODELS["70b"]
    for _ in range(1000):
        source, target = rng.sample(workers, 2)
        new, streams = rng.randrange(100, 60_000), rng.randrange(40)
        held, busy_s = streams * 9000.0, rng.random() / 100
        num_bytes = new * costs.bytes_per_token
        model.saw_prefill(source.key, new, 0, 0, costs.prefill_s(new, 0) * rng.gauss(1, 0.05))
        model.saw_transfer(source.key, target.key, num_bytes, costs.transfer_s(num_bytes, 0.0) * rng.gauss(1, 0.05))
        model.saw_tokens(streams, held, busy_s, costs.step_s(streams, held) + busy_s)
        model.saw_answer(rng.randrange(1, 600))


def _join(registry: Registry, role: Role, number: int) -> WorkerRecord:
    fingerprint = Fingerprint("m", "w", "bfloat16", 1, 1, 1, BLOCK_SIZE, "l")
    hello = Hello(role, 1, fingerprint, 1 << 20, 1 << 20, 131_072, "", ["tcp"], 1 << 14)
    record = registry.greet(WorkerKey(f"{role}-{number:03d}", f"{number:016x}"), hello, 0.0)[1]
    assert record is not None
    return record


def _load(worker: WorkerRecord, rng: random.Random) -> None:
    if worker.can_decode:
        worker.num_streams = rng.randrange(4, 40)
        worker.num_running = worker.num_streams - rng.randrange(3)
        worker.used_blocks = worker.num_streams * rng.randrange(40, 900)
    for place in range(rng.randrange(6) if worker.can_prefill else rng.randrange(2)):
        worker.prompts.add(AttemptKey(f"{worker.key.worker_id} {place}", 1), rng.uniform(0.1, 6.0), 0.0)
        worker.queued_tokens += rng.randrange(500, 40_000)
    for place in range(rng.randrange(1, 40)):
        worker.attempts[AttemptKey(f"{worker.key.worker_id} {place}", 1)] = None


class Prompts:
    def __init__(self, num_tokens: int, rng: random.Random) -> None:
        self._num_tokens, self._rng, self._count = num_tokens, rng, 0
        self._prefixes = [self._draw(num_tokens) for _ in range(NUM_PREFIXES)]

    def _draw(self, count: int) -> list[int]:
        return [self._rng.randrange(128_000) for _ in range(count)]

    def next(self) -> GenerateRequest:
        self._count += 1
        shared = 0
        if self._rng.random() < SHARE:
            shared = int(self._num_tokens * self._rng.uniform(0.5, 0.99))
        ids = self._rng.choice(self._prefixes)[:shared] + self._draw(self._num_tokens - shared)
        return GenerateRequest(f"r{self._count}", ids, SamplingParams(max_tokens=1024), 600.0)


def _timed(act: Callable[[], Any], times: list[float]) -> Any:
    begun = time.perf_counter_ns()
    result = act()
    times.append((time.perf_counter_ns() - begun) / 1e3)
    return result


def measure(cluster: Cluster, prompts: Prompts, num_decisions: int, num_warm: int) -> dict[str, dict[str, float]]:
    """Quantiles by part, in microseconds, of the decisions after the first `num_warm`."""
    parts: dict[str, list[float]] = {name: [] for name in ("hash", "decide", "decision", "note", "check")}
    placer = cluster.placer
    for number in range(num_warm + num_decisions):
        now, request = 0.01 * number, prompts.next()
        data = _timed(partial(check_request, request), parts["check"])
        record = RequestRecord(request, number, data, now, now + 600.0)
        # A prompt is in no cache at first, so each is either decided on at once or part by part.
        if number % 2:
            _timed(partial(placer.hash_prompt, record, BLOCK_SIZE), parts["hash"])
        placement = _timed(partial(placer.place, record, now), parts["decide" if number % 2 else "decision"])
        assert isinstance(placement, Placement)
        _timed(partial(placer.note_dispatch, record, placement), parts["note"])
        if placement.prefill is not None:
            placer.note_arrival(record, placement.decode.key)
    return {
        name: _quantiles(times[len(times) * num_warm // (num_warm + num_decisions) :]) for name, times in parts.items()
    }


def _quantiles(times: list[float]) -> dict[str, float]:
    return {f"p{round(100 * q)}": round(quantile(times, q), 1) for q in (0.5, 0.9, 0.99)}


def run(num_tokens: int, num_decisions: int, policy: str, seed: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for shape in ((32, 32, 0), (0, 0, 64), (16, 32, 16)):
        cluster = make_cluster(*shape, policy=policy, seed=seed)
        parts = measure(cluster, Prompts(num_tokens, cluster.rng), num_decisions, num_warm=num_decisions // 5)
        names = ("prefill", "decode", "both")
        workers = dict(zip(names, shape, strict=True))
        rows.append({"workers": workers, "policy": policy, "prompt_tokens": num_tokens, "microseconds": parts})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="of each prompt (default: 100000)")
    parser.add_argument("--decisions", type=int, default=300, help="timed, of each cluster (default: 300)")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write there instead of to standard output")
    args = parser.parse_args()
    text = json.dumps(run(args.tokens, args.decisions, args.policy, args.seed), indent=1)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
