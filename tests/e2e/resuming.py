"""What the tests of exact resume share: kinds of requests, faults at a token, clusters, and what equal means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from penstock.protocol.sampling import SamplingParams
from penstock.router.config import RouterConfig
from penstock.router.interface import GenerateRequest
from penstock.testing.inprocess import PATIENCE_S, InProcessCluster, Result

from .comparing import assert_equal
from .conftest import MakeEngine

NUM_TOKENS = 10
ROUTER = RouterConfig(
    policy="prefix-affinity", worker_timeout_s=PATIENCE_S, unacknowledged_s=PATIENCE_S, unavailable_s=PATIENCE_S
)

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, logprobs=3, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.9, top_p=0.95, top_k=50, seed=11, logprobs=3)
KINDS = {
    "greedy": GREEDY,
    "seeded": msgspec.structs.replace(SEEDED, ignore_eos=True),
    "penalties": SamplingParams(
        max_tokens=NUM_TOKENS,
        temperature=0.7,
        seed=3,
        repetition_penalty=1.3,
        frequency_penalty=0.6,
        presence_penalty=0.4,
        logprobs=3,
        ignore_eos=True,
    ),
    "min_tokens": SamplingParams(max_tokens=NUM_TOKENS, temperature=1.2, seed=9, min_tokens=7, logprobs=3),
    "n=3": SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, n=3, seed=8, logprobs=3, ignore_eos=True),
}
AtTurn = Callable[[InProcessCluster], None]


@dataclass
class Fault:
    """Does `action` once, when the request has got `index` tokens."""

    index: int
    action: AtTurn
    happened_at: int | None = field(default=None, init=False)  # tokens the caller had then

    def __call__(self, cluster: InProcessCluster) -> None:
        num_tokens = sum(result.num_tokens for result in cluster.results.values())
        if self.happened_at is None and num_tokens >= self.index:
            self.happened_at = num_tokens
            self.action(cluster)


def each_of(faults: list[Fault]) -> AtTurn:
    def at_turn(cluster: InProcessCluster) -> None:
        for fault in faults:
            fault(cluster)

    return at_turn


def holder(cluster: InProcessCluster, role: str) -> str:
    """The worker of this role that works on the one request, or holds its attempt."""
    rows = [row for row in cluster.router.status().workers if row.worker_id.startswith(role) and row.num_attempts]
    assert len(rows) == 1, f"one {role} worker has the request, found {[row.worker_id for row in rows]}"
    return rows[0].worker_id


def assert_exact(found: dict[str, Result], expected: dict[str, Result]) -> None:
    assert_equal(found, expected, same_alternatives=True)


@contextmanager
def two_and_two(make_engine: MakeEngine) -> Iterator[InProcessCluster]:
    engines = {name: make_engine(64) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")}
    with InProcessCluster(engines, router=ROUTER) as cluster:
        yield cluster


@contextmanager
def one_and_one(make_engine: MakeEngine) -> Iterator[InProcessCluster]:
    with InProcessCluster({"prefill-0": make_engine(64), "decode-0": make_engine(64)}, router=ROUTER) as cluster:
        yield cluster


@contextmanager
def colocated(make_engine: MakeEngine) -> Iterator[InProcessCluster]:
    with InProcessCluster({"both-0": make_engine(64)}, router=ROUTER) as cluster:
        yield cluster


_undisturbed: dict[bytes, dict[str, Result]] = {}


def undisturbed(make_engine: MakeEngine, request: GenerateRequest) -> dict[str, Result]:
    """What a cluster that nothing happens to answers; computed once for each request."""
    name = msgspec.msgpack.encode(request)
    if name not in _undisturbed:
        with one_and_one(make_engine) as cluster:
            _undisturbed[name] = cluster.run([request])
        assert _undisturbed[name]["r"].attempts == 1
    return _undisturbed[name]
