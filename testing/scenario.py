"""What a seed means: the shape of the cluster, the mix of faults, the requests, and when things happen to them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..protocol.sampling import SamplingParams
from ..router.config import RouterConfig
from ..router.interface import GenerateRequest
from .chaos import ChaosProfile
from .cluster import ClusterShape, SimCluster
from .journal import InvariantBroken

STORM_S = 8.0  # faults happen up to here
LIMIT_S = 150.0  # by now every deadline has passed
REST_S = 8.0  # longer than any lease and early-offer memory
MAX_EVENTS = 400_000


@dataclass(frozen=True, slots=True)
class Scenario:
    seed: int
    shape: ClusterShape
    profile: ChaosProfile
    requests: tuple[tuple[float, GenerateRequest], ...]  # (when, what)
    cancels: tuple[tuple[float, str, int | None], ...]
    kills: tuple[tuple[float, str, bool], ...]
    freezes: tuple[tuple[float, str, float], ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    seed: int
    num_events: int
    num_requests: int
    num_errors: int
    num_retries: int
    num_preemptions: int
    num_parked: int
    num_unparked: int
    virtual_s: float
    faults: Counter[str]


CALM_EVERY = 10  # one seed in so many meets a perfect network and immortal workers


def draw_scenario(seed: int) -> Scenario:
    rng = random.Random(seed)
    shape = _with_parking(_draw_shape(rng), seed)
    profile = replace(ChaosProfile.draw(rng), corrupt_parked=random.Random(f"corrupt {seed}").choice([0.0, 0.3, 1.0]))
    within_s = rng.choice([0.02, 0.2, 2.0])  # from a burst to one after the other
    requests = tuple(_draw_request(rng, i, within_s) for i in range(rng.randint(3, 12)))
    cancels = tuple(_draw_cancel(rng, request, within_s) for _, request in requests if rng.random() < 0.2)
    names = [f"prefill-{i}" for i in range(shape.num_prefill)] + [f"decode-{i}" for i in range(shape.num_decode)]
    names += [f"both-{i}" for i in range(shape.num_both)]
    kills = tuple((_moment(rng, within_s), rng.choice(names), rng.random() < 0.5) for _ in range(profile.kills))
    freezes = tuple((_moment(rng, within_s), rng.choice(names), rng.random() * 4) for _ in range(profile.freezes))
    if seed % CALM_EVERY == 0:
        return Scenario(seed, shape, ChaosProfile(), requests, (), (), ())
    return Scenario(seed, shape, profile, requests, cancels, kills, freezes)


def _moment(rng: random.Random, within_s: float) -> float:
    """A time while the requests run: within their arrivals, or shortly after."""
    return rng.random() * (within_s + 0.3)


def _draw_shape(rng: random.Random) -> ClusterShape:
    router = RouterConfig(
        policy=rng.choice(["round-robin", "least-loaded", "prefix-affinity"]),
        local_prefill_max_tokens=rng.choice([0, 0, 8]),
        max_attempts=8,
        unavailable_s=20.0,
    )
    shape = ClusterShape(
        num_prefill=rng.choice([1, 1, 2]),
        num_decode=rng.choice([1, 1, 2]),
        num_blocks=rng.randint(11, 24),
        block_size=rng.choice([2, 4, 4]),
        max_batch_tokens=rng.choice([4, 8, 16, 64]),
        max_running=rng.choice([2, 4, 8]),
        router=router,
    )
    return replace(shape, num_prefill=0, num_decode=0, num_both=rng.randint(1, 2)) if rng.random() < 0.1 else shape


def _with_parking(shape: ClusterShape, seed: int) -> ClusterShape:
    """Little host memory, and copies from free to dearer than any prefill."""
    rng = random.Random(f"parking {seed}")
    return replace(shape, park_blocks=rng.choice([0, 4, 12, 40, 40]), park_copy_s=rng.choice([0.0, 1e-6, 1e-3, 0.1]))


def _draw_request(rng: random.Random, number: int, within_s: float) -> tuple[float, GenerateRequest]:
    family = random.Random(rng.randint(0, 2))
    prefix = [family.randrange(1, 1000) for _ in range(rng.choice([0, 4, 8, 12]))]
    prompt = prefix + [rng.randrange(1, 1000) for _ in range(rng.randint(1, 10))]
    params = SamplingParams(
        max_tokens=rng.randint(1, 14),
        n=rng.choice([1, 1, 1, 1, 2, 3]),
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randrange(1 << 40),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([None, 0]),
    )
    timeout_s = 0.3 if rng.random() < 0.05 else 100.0
    return rng.random() * within_s, GenerateRequest(f"r{number}", prompt, params, timeout_s)


def _draw_cancel(rng: random.Random, request: GenerateRequest, within_s: float) -> tuple[float, str, int | None]:
    choice = rng.randrange(request.params.n) if request.params.n > 1 and rng.random() < 0.5 else None
    return _moment(rng, within_s), request.request_id, choice


def run_scenario(scenario: Scenario, trace: Callable[[str], None] | None = None) -> Outcome:
    """Play it to its end and a while longer; raises InvariantBroken as soon as a promise does not hold."""
    cluster = SimCluster(scenario.shape, scenario.profile, scenario.seed, trace)
    _plan(cluster, scenario)
    cluster.events.after(STORM_S, cluster.calm)
    start, limit, rest_until = cluster.clock.now(), cluster.clock.now() + LIMIT_S, None
    while cluster.events.run_next():
        now = cluster.clock.now()
        if cluster.events.num_run > MAX_EVENTS:
            raise InvariantBroken(f"the cluster does not come to rest: {MAX_EVENTS} events")
        if rest_until is None and (now > limit or (now > start + STORM_S and _all_ended(cluster))):
            cluster.journal.check_finished()
            rest_until = now + REST_S
        if rest_until is not None and now > rest_until:
            break
    cluster.check_at_rest()
    _check_no_false_alarm(cluster, scenario)
    return _outcome(cluster, scenario, cluster.clock.now() - start)


def _plan(cluster: SimCluster, scenario: Scenario) -> None:
    events = cluster.events
    for when, request in scenario.requests:
        events.after(1.0 + when, lambda r=request: cluster.submit(r))  # type: ignore[misc]
    for when, request_id, choice in scenario.cancels:
        events.after(1.0 + when, lambda r=request_id, c=choice: cluster.cancel(r, c))  # type: ignore[misc]
    for when, name, tell in scenario.kills:
        events.after(1.0 + when, lambda n=name, t=tell: cluster.kill_worker(n, tell_router=t))  # type: ignore[misc]
    for when, name, seconds in scenario.freezes:
        events.after(1.0 + when, lambda n=name, s=seconds: cluster.freeze_worker(n, s))  # type: ignore[misc]


def _all_ended(cluster: SimCluster) -> bool:
    return all(record.end is not None for record in cluster.journal.records.values())


def _check_no_false_alarm(cluster: SimCluster, scenario: Scenario) -> None:
    """Where nothing went wrong, nothing may have been retried or refused as wrong."""
    broken = cluster.router.counters.broken_streams
    if scenario.profile.is_lossless and broken:
        raise InvariantBroken(f"I3 {broken} streams broke though no message was lost, doubled or late")


def _outcome(cluster: SimCluster, scenario: Scenario, virtual_s: float) -> Outcome:
    records = cluster.journal.records.values()
    loads = [worker.core.snapshot().load for worker in cluster.workers.values()]
    return Outcome(
        seed=scenario.seed,
        num_events=cluster.events.num_run,
        num_requests=len(records),
        num_errors=sum(r.end is not None and r.end.error is not None for r in records),
        num_retries=cluster.router.counters.retries,
        num_preemptions=sum(load.preemptions for load in loads),
        num_parked=sum(load.parked for load in loads),
        num_unparked=sum(load.unparked for load in loads),
        virtual_s=virtual_s,
        faults=cluster.faults,
    )
