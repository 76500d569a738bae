"""Overload on virtual time, with the real router: goodput stays where it was, refusals come at once, shares hold."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest

from penstock.core.config import ClassConfig, RefuseLate
from penstock.simulator.cluster import Journey, Shape, TraceCluster
from penstock.simulator.costs import MODELS
from penstock.simulator.report import Targets
from penstock.simulator.runs import router_config
from penstock.simulator.trace import TraceRequest

TARGETS = Targets(2.0, 0.03)
PEAK_RATE = 14.0  # about what one prefill and one decode worker of the 8b model keep up with, see the test below
SECONDS = 60.0


def poisson(
    rate: float, *, seed: int = 1, class_name: str = "", tenant: str = "", seconds: float = SECONDS, first_id: int = 0
) -> list[TraceRequest]:
    """Prompts of 200 to 4,000 tokens that share nothing, answers of 20 to 400."""
    made: list[TraceRequest] = []
    rng, now = random.Random(seed), 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        tokens = rng.randint(200, 4000)
        ids = tuple(first_id + 8 * len(made) + block for block in range(-(-tokens // 512)))
        made.append(TraceRequest(now, tokens, rng.randint(20, 400), ids, class_name, tenant))
    return made


def play(trace: list[TraceRequest], refuse: RefuseLate, shape: Shape, classes: tuple[ClassConfig, ...] = ()):
    config = replace(router_config("auto", TARGETS), refuse_late=refuse)
    if classes:
        config = replace(config, classes=classes)
    cluster = TraceCluster(shape, MODELS["8b"], config, 0)
    journeys = cluster.run(sorted(trace, key=lambda request: request.arrival_s))
    cluster.core.check_invariants()
    return journeys


@dataclass(frozen=True)
class Outcome:
    """Requests per second within both targets, and how long refused ones waited for that word."""

    goodput: float
    num_refused: int
    refusals_s: list[float]


def outcome(journeys: list[Journey]) -> Outcome:
    whole = [journey for journey in journeys if not journey.error]
    good = sum(j.ttft_s <= TARGETS.ttft_s and j.tpot_s <= TARGETS.tpot_s for j in whole)
    refused = [journey for journey in journeys if journey.error]
    waits = sorted((journey.end_s or 0.0) - journey.request.arrival_s for journey in refused)
    return Outcome(good / SECONDS, len(refused), waits)


def flat_share(shape: Shape, rate: float, refuse: RefuseLate) -> tuple[float, Outcome]:
    """Goodput under three times the peak rate, as a share of the goodput at that rate; both with the same admission."""
    at_peak = outcome(play(poisson(rate), "never", shape))
    over = outcome(play(poisson(3 * rate, seed=2), refuse, shape))
    return over.goodput / at_peak.goodput, over


# ---- goodput


def test_goodput_stays_at_three_times_the_peak() -> None:
    share, over = flat_share(Shape(1, 1), PEAK_RATE, "always")
    assert share >= 0.95
    assert over.num_refused > 1000
    assert over.refusals_s[int(0.99 * len(over.refusals_s))] == 0.0, "refused when they came"


def test_goodput_breaks_down_without_refusals() -> None:
    """What the test above would see if admission did nothing."""
    share, over = flat_share(Shape(1, 1), PEAK_RATE, "never")
    assert share < 0.3
    assert over.num_refused == 0


def test_rate_called_peak_is_about_the_highest_that_keeps_up() -> None:
    kept = outcome(play(poisson(PEAK_RATE), "never", Shape(1, 1)))
    lost = outcome(play(poisson(1.2 * PEAK_RATE), "never", Shape(1, 1)))
    assert kept.goodput >= 0.95 * len(poisson(PEAK_RATE)) / SECONDS
    assert lost.goodput < 0.7 * kept.goodput


def test_colocated_goodput_stays_too() -> None:
    """Prompts and streams share a worker, so what has to be kept from piling up is both."""
    share, over = flat_share(Shape(num_both=2), 13.0, "always")
    assert share >= 0.95
    waited = [wait for wait in over.refusals_s if wait > 0.05]
    assert len(waited) < 0.05 * over.num_refused


def test_quiet_cluster_refuses_nobody() -> None:
    quiet = outcome(play(poisson(0.7 * PEAK_RATE), "always", Shape(1, 1)))
    assert quiet.num_refused == 0


def test_refused_requests_are_told_when_to_come_again() -> None:
    journeys = play(poisson(3 * PEAK_RATE, seconds=20.0), "always", Shape(1, 1))
    refused = [journey for journey in journeys if journey.error]
    assert refused
    assert {1 <= journey.retry_after_s <= 60 for journey in refused} == {True}


def test_same_seed_gives_the_same_refusals() -> None:
    first, second = (play(poisson(30.0, seconds=10.0), "always", Shape(1, 1)) for _ in range(2))
    assert [(j.end_s, j.error) for j in first] == [(j.end_s, j.error) for j in second]


# ---- shares


def tokens_served(journeys: list[Journey], until_s: float, **fields: str) -> int:
    """Prompt and output tokens of requests whose first token came by then."""
    mine = [j for j in journeys if all(getattr(j.request, name) == value for name, value in fields.items())]
    served = [j for j in mine if j.first_s is not None and j.first_s <= until_s]
    return sum(j.request.num_prompt_tokens + j.request.num_output_tokens for j in served)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (4.0, 1.0)])
def test_backlogged_classes_are_served_by_weight(weights) -> None:
    classes = (ClassConfig("first", weights[0]), ClassConfig("standard", weights[1]))
    trace = poisson(25.0, class_name="first", seconds=30.0) + poisson(
        25.0, seed=2, class_name="standard", seconds=30.0, first_id=1 << 20
    )
    journeys = play(trace, "auto", Shape(1, 1), classes)
    first, second = (tokens_served(journeys, 30.0, class_name=name) for name in ("first", "standard"))
    assert first / second == pytest.approx(weights[0] / weights[1], rel=0.15)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def test_tenant_that_floods_does_not_delay_the_other() -> None:
    """The quiet one sends less than its half and waits little; alone in one queue it would wait with the flood."""
    flood = poisson(60.0, tenant="flood", seconds=30.0)
    quiet = poisson(4.0, seed=2, tenant="quiet", seconds=30.0, first_id=1 << 20)
    shared = play(flood + quiet, "auto", Shape(1, 1))
    fair = [j.ttft_s for j in shared if j.request.tenant == "quiet"]
    alone = play([replace(r, tenant="") for r in flood + quiet], "auto", Shape(1, 1))
    unfair = [j.ttft_s for j in alone if j.request.prefix_ids[0] >= 1 << 20]
    assert quantile(fair, 0.9) < 1.0
    assert quantile(unfair, 0.5) > 10.0


def test_interactive_class_keeps_its_targets_beside_a_flood_of_batch() -> None:
    classes = (
        ClassConfig("interactive", 8.0, target_ttft_s=1.5, target_tpot_s=0.03),
        ClassConfig("standard", 4.0),
        ClassConfig("batch", 1.0),
    )
    chats = poisson(6.0, class_name="interactive", seconds=30.0)
    trace = chats + poisson(40.0, seed=2, class_name="batch", seconds=30.0, first_id=1 << 20)
    journeys = play(trace, "auto", Shape(1, 1), classes)
    mine = [j for j in journeys if j.request.class_name == "interactive"]
    kept = sum(not j.error and j.ttft_s <= 1.5 and j.tpot_s <= 0.03 for j in mine)
    assert kept >= 0.95 * len(mine)
    batch = [j for j in journeys if j.request.class_name == "batch"]
    assert all(not j.error for j in batch), "batch has no target and waits"
