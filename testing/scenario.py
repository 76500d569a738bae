"""What a seed means: the shape of the cluster, the mix of faults, the requests, and when things happen to them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from ..core.policy import PolicyName
from ..protocol.messages import MAX_REQUESTS, Role
from ..protocol.sampling import SamplingParams
from ..router.config import RouterConfig
from ..router.interface import GenerateRequest
from .chaos import ChaosProfile
from .cluster import ClusterShape, SimCluster
from .history import HistoryWriter
from .invariants import InvariantBroken
from .second_router import SecondPlan

READY_S = 0.5  # workers have met by then, and the first request comes
STORM_S = 8.0  # faults happen up to here
LIMIT_S = 150.0  # by now every deadline has passed
REST_S = 8.0  # longer than any lease and early-offer memory
MAX_EVENTS = 400_000
ONE_POOL_SHARE = 0.25
URGENCY_SHARE = 0.25
SECOND_SHARE = 0.25
CALM_EVERY = 10  # one seed in so many meets a perfect network and immortal workers; another one drains them, in peace
IMPOSSIBLE_ID = 5000  # a token that no worker of the simulation has in its vocabulary


@dataclass(frozen=True, slots=True)
class Scenario:
    seed: int
    shape: ClusterShape
    profile: ChaosProfile
    requests: tuple[tuple[float, GenerateRequest], ...]  # (when, what)
    cancels: tuple[tuple[float, str, int | None], ...] = ()
    kills: tuple[tuple[float, str, bool], ...] = ()
    freezes: tuple[tuple[float, str, float], ...] = ()
    drains: tuple[tuple[float, str], ...] = ()
    hangs: tuple[tuple[float, str, float], ...] = ()
    second: SecondPlan | None = None  # a second router on the same workers
    roles: tuple[tuple[float, str, Role], ...] = ()


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
    num_drafted: int
    num_accepted: int
    virtual_s: float
    faults: Counter[str]


def draw_scenario(seed: int) -> Scenario:
    rng = random.Random(seed)
    shape = _with_drafts(_with_one_pool(_with_parking(_draw_shape(rng, seed), seed), seed), seed)
    profile = replace(ChaosProfile.draw(rng), corrupt_parked=random.Random(f"corrupt {seed}").choice([0.0, 0.3, 1.0]))
    if profile.is_perfect:  # by chance: no fault of the swarm is on
        shape = _with_room(shape)
    within_s = rng.choice([0.02, 0.2, 2.0])  # from a burst to one after the other
    requests = _with_urgency(tuple(_draw_request(rng, i, within_s) for i in range(rng.randint(3, 12))), seed)
    cancels = tuple(_draw_cancel(rng, request, within_s) for _, request in requests if rng.random() < 0.2)
    names = [name for name in shape.roles() if not name.startswith("foreign")]
    num_drains = profile.drains or int(seed % CALM_EVERY == CALM_EVERY // 2)
    drains = tuple((_moment(rng, within_s), rng.choice(names)) for _ in range(num_drains))
    second = _draw_second(seed, within_s)
    roles = _draw_roles(shape, names, within_s, seed)
    is_calm = seed % CALM_EVERY in (0, CALM_EVERY // 2)
    if second is not None and is_calm:  # two routers may send their last request to the same place
        shape = replace(shape, max_requests=MAX_REQUESTS)
    if seed % CALM_EVERY == 0:
        return Scenario(seed, _with_room(shape), ChaosProfile(), requests, second=second, roles=roles)
    if seed % CALM_EVERY == CALM_EVERY // 2:
        profile = ChaosProfile(drains=len(drains))
        return Scenario(seed, _with_room(shape), profile, requests, drains=drains, second=second, roles=roles)
    kills = tuple((_moment(rng, within_s), rng.choice(names), rng.random() < 0.5) for _ in range(profile.kills))
    freezes = tuple((_moment(rng, within_s), rng.choice(names), rng.random() * 4) for _ in range(profile.freezes))
    hangs = tuple((_moment(rng, within_s), rng.choice(names), rng.random() * 4) for _ in range(profile.hangs))
    return Scenario(seed, shape, profile, requests, cancels, kills, freezes, drains, hangs, second, roles)


def _draw_second(seed: int, within_s: float) -> SecondPlan | None:
    """Some clusters have two routers, of which the second one is killed or not. Its clients count from 0, too."""
    rng = random.Random(f"second {seed}")
    if rng.random() >= SECOND_SHARE:
        return None
    requests = tuple(_draw_request(rng, i, within_s) for i in range(rng.randint(2, 8)))
    kills = tuple(_moment(rng, within_s) for _ in range(rng.choice([0, 1, 1, 2])))
    return SecondPlan(requests, kills, rng.choice([0.3, 1.0, 4.0]))


def _with_room(shape: ClusterShape) -> ClusterShape:
    """Where nothing is lost, no offer that overtakes its command may be refused for want of a place either."""
    return replace(shape, max_early=1024)


def _moment(rng: random.Random, within_s: float) -> float:
    """A time while the requests run: within their arrivals, or shortly after."""
    return rng.random() * (within_s + 0.3)


def _draw_roles(
    shape: ClusterShape, names: list[str], within_s: float, seed: int
) -> tuple[tuple[float, str, Role], ...]:
    """In half of all clusters workers change their roles; not where they share one memory, whose shares are fixed."""
    rng = random.Random(f"roles {seed}")
    if shape.one_pool or rng.random() < 0.5:
        return ()
    choices: list[Role] = ["prefill", "decode", "both"]
    return tuple((_moment(rng, within_s), rng.choice(names), rng.choice(choices)) for _ in range(rng.randint(1, 4)))


def _draw_policy(older: PolicyName, seed: int) -> PolicyName:
    """Half of all clusters use `auto`, and some another of the newer policies."""
    newer: list[PolicyName] = ["kv-overlap", "session-affinity", "power-of-two", "random"]
    rng = random.Random(f"policy {seed}")
    return rng.choice([older, "auto", "auto", rng.choice([older, *newer])])


def _draw_shape(rng: random.Random, seed: int) -> ClusterShape:
    router = RouterConfig(
        policy=_draw_policy(rng.choice(["round-robin", "least-loaded", "prefix-affinity"]), seed),
        local_prefill_max_tokens=rng.choice([0, 0, 8]),
        max_queued_requests=rng.choice([1024, 1024, 4]),
        max_prefix_blocks=rng.choice([65536, 8]),
        max_exact_blocks=random.Random(f"exact index {seed}").choice([0, 0, 65536, 65536, 8]),
        max_attempts=8,
        unavailable_s=20.0,
        canary=random.Random(f"canary {seed}").random() < 0.4,
        canary_idle_s=random.Random(f"idle {seed}").choice([0.0, 0.3]),
    )
    shape = ClusterShape(
        num_prefill=rng.choice([1, 1, 2]),
        num_decode=rng.choice([1, 1, 2]),
        num_foreign=int(rng.random() < 0.1),
        num_blocks=rng.randint(11, 24),
        block_size=rng.choice([2, 4, 4]),
        step_s=rng.choice([0.002, 0.002, 0.002, 0.1]),
        max_batch_tokens=rng.choice([4, 8, 16, 64]),
        max_running=rng.choice([2, 4, 8]),
        max_requests=rng.choice([1024, 1024, 6]),
        max_early=rng.choice([32, 2]),
        early_s=rng.choice([5.0, 0.5]),
        max_step_s=rng.choice([60.0, 1.0]),
        router=router,
    )
    if rng.random() < 0.1:
        return replace(shape, num_prefill=0, num_decode=0, num_foreign=0, num_both=rng.randint(1, 2))
    return shape


def _with_drafts(shape: ClusterShape, seed: int) -> ClusterShape:
    """Half of all clusters speculate, from always wrong to always right."""
    rng = random.Random(f"drafts {seed}")
    return replace(
        shape,
        draft_tokens=rng.choice([0, 0, 1, 2, 4, 8]),
        draft_hits=rng.choice([0.0, 0.5, 0.9, 1.0]),
        draft_seed=seed,
    )


def _with_parking(shape: ClusterShape, seed: int) -> ClusterShape:
    """Little host memory, and copies from free to dearer than any prefill."""
    rng = random.Random(f"parking {seed}")
    return replace(shape, park_blocks=rng.choice([0, 4, 12, 40, 40]), park_copy_s=rng.choice([0.0, 1e-6, 1e-3, 0.1]))


def _with_one_pool(shape: ClusterShape, seed: int) -> ClusterShape:
    """Some clusters keep all blocks in one memory."""
    rng = random.Random(f"one pool {seed}")
    return replace(shape, one_pool=rng.random() < ONE_POOL_SHARE, keep_prefix=rng.random() < 0.7)


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
        logprobs=rng.choice([None, 0, 2]),
        min_tokens=rng.choice([0, 0, 1]),
        stop_token_ids=rng.choice([(), (), (rng.randrange(1000), rng.randrange(1000))]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.5]),
        logit_bias=rng.choice([{}, {}, {rng.randrange(1000): 2.5}]),
    )
    if rng.random() < 0.03:
        prompt[-1] = IMPOSSIBLE_ID
    timeout_s = rng.choice([0.02, 0.3]) if rng.random() < 0.1 else 100.0
    return rng.random() * within_s, GenerateRequest(f"r{number}", prompt, params, timeout_s)


def _with_urgency(
    requests: tuple[tuple[float, GenerateRequest], ...], seed: int
) -> tuple[tuple[float, GenerateRequest], ...]:
    """In some clusters requests are of several classes and tenants."""
    rng = random.Random(f"urgency {seed}")
    if rng.random() >= URGENCY_SHARE:
        return requests
    return tuple(
        (when, msgspec.structs.replace(request, priority=rng.choice([-1, 0, 1]), tenant=rng.choice(["", "other"])))
        for when, request in requests
    )


def _draw_cancel(rng: random.Random, request: GenerateRequest, within_s: float) -> tuple[float, str, int | None]:
    choice = rng.randrange(request.params.n) if request.params.n > 1 and rng.random() < 0.5 else None
    return _moment(rng, within_s), request.request_id, choice


def run_scenario(
    scenario: Scenario, trace: Callable[[str], None] | None = None, history: HistoryWriter | None = None
) -> Outcome:
    """Play it until everything has come to rest; raises InvariantBroken as soon as a promise does not hold."""
    cluster = SimCluster(scenario.shape, scenario.profile, scenario.seed, trace, history)
    start = cluster.clock.now()
    try:
        _plan(cluster, scenario)
        _play(cluster)
        virtual_s = cluster.clock.now() - start
        cluster.check_at_rest()
        _check_no_false_alarm(cluster, scenario)
    except Exception:
        if trace is not None:
            for line in cluster.situation():
                trace(f"           {line}")
        raise
    finally:
        cluster.close()
    return _outcome(cluster, scenario, virtual_s)


def _play(cluster: SimCluster) -> None:
    """Until nothing is left to happen, or something must be wrong."""
    events, start = cluster.events, cluster.clock.now()
    rest_until: float | None = None
    while events.run_next():
        now = cluster.clock.now()
        if now > start + READY_S and not events.num_awaited and cluster.is_quiet:
            return
        if events.num_run > MAX_EVENTS:
            raise InvariantBroken(f"I8 the cluster does not come to rest: {MAX_EVENTS} events")
        if rest_until is None and (now > start + LIMIT_S or (now > start + STORM_S and not cluster.num_open)):
            cluster.journal.check_finished()
            rest_until = now + REST_S
        if rest_until is not None and now > rest_until:
            return


def _plan(cluster: SimCluster, scenario: Scenario) -> None:
    def at(when: float, action: Callable[..., None], *args: object) -> None:
        cluster.events.after(READY_S + when, lambda: action(*args))

    for when, request in scenario.requests:
        at(when, cluster.submit, request)
    for when, request_id, choice in scenario.cancels:
        at(when, cluster.cancel, request_id, choice)
    for when, name, tell_router in scenario.kills:
        at(when, lambda name, told: cluster.kill_worker(name, tell_router=told), name, tell_router)
    for when, name, seconds in scenario.freezes:
        at(when, cluster.freeze_worker, name, seconds)
    for when, name in scenario.drains:
        at(when, cluster.drain_worker, name)
    for when, name, seconds in scenario.hangs:
        at(when, cluster.hang_worker, name, seconds)
    if scenario.second is not None:
        second = cluster.add_second_router(scenario.second)
        for when, request in scenario.second.requests:
            at(when, second.submit, request)
        for when in scenario.second.kills:
            at(when, second.kill)
    for when, name, role in scenario.roles:
        at(when, cluster.change_role, name, role)
    cluster.events.after(STORM_S, cluster.calm, is_awaited=False)


def _check_no_false_alarm(cluster: SimCluster, scenario: Scenario) -> None:
    """Where nothing went wrong, nothing may have been tried twice."""
    num_retries = cluster.router.counters.retries
    if scenario.profile.is_perfect and num_retries:
        raise InvariantBroken(f"I14 router: {num_retries} retries though nothing was lost")


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
        num_drafted=sum(load.drafted_tokens for load in loads),
        num_accepted=sum(load.accepted_tokens for load in loads),
        virtual_s=virtual_s,
        faults=cluster.faults,
    )
