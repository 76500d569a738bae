"""A load that turns from long prompts to long answers: no fixed split suits it, and the planner follows it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.simulator.cluster import Shape, TraceCluster
from penstock.simulator.costs import MODELS
from penstock.simulator.report import Summary, Targets
from penstock.simulator.runs import router_config, simulate_parts
from penstock.simulator.shifting import DECODE_HEAVY, PREFILL_HEAVY, Half, shifting_trace

TARGETS = Targets(5.0, 0.05)
HALVES = tuple(
    replace(half, duration_s=80.0, requests_per_s=half.requests_per_s / 2) for half in (PREFILL_HEAVY, DECODE_HEAVY)
)
FIXED = (Shape(1, 3), Shape(2, 2), Shape(3, 1))


def run(shape: Shape, halves: tuple[Half, ...], num_parts: int = 1, **settings: bool) -> list[Summary]:
    trace = shifting_trace(0, halves)
    return simulate_parts(trace, "least-loaded", shape, MODELS["70b"], TARGETS, 0, num_parts, **settings)


def test_trace_is_the_same_each_time_and_turns_half_way() -> None:
    trace = shifting_trace(3, HALVES)
    assert trace == shifting_trace(3, HALVES)
    assert trace != shifting_trace(4, HALVES)
    early = [request for request in trace if request.arrival_s < 80]
    late = [request for request in trace if request.arrival_s >= 80]
    assert min(request.num_prompt_tokens for request in early) > max(request.num_prompt_tokens for request in late)
    assert max(request.num_output_tokens for request in early) < min(request.num_output_tokens for request in late)
    assert [request.arrival_s for request in trace] == sorted(request.arrival_s for request in trace)
    assert trace[-1].arrival_s < 160
    assert len(early) == pytest.approx(200, rel=0.25)
    assert len(late) == pytest.approx(800, rel=0.25)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_planner_beats_every_fixed_split_and_comes_near_the_best_of_each_half() -> None:
    whole, *parts = run(Shape(2, 2), HALVES, 2, balance_roles=True)
    fixed = [run(shape, HALVES)[0] for shape in FIXED]
    assert whole.num_failed == 0
    assert 1 <= whole.num_role_changes <= 6
    assert whole.goodput > max(row.goodput for row in fixed)
    assert whole.ttft_mean_s < min(row.ttft_mean_s for row in fixed)
    assert whole.ttft_p99_s < min(row.ttft_p99_s for row in fixed)
    for part, half in zip(parts, HALVES, strict=True):
        best = max((run(shape, (half,))[0] for shape in FIXED), key=lambda row: (row.goodput, -row.ttft_mean_s))
        assert part.goodput >= best.goodput - 0.12
        assert part.ttft_mean_s <= 2 * best.ttft_mean_s + 0.1


@pytest.mark.parametrize("half", HALVES, ids=["prompts", "answers"])
def test_steady_load_is_followed_once_and_then_left_alone(half: Half) -> None:
    config = replace(router_config("auto", TARGETS), balance_roles=True, max_worker_streams=256)
    cluster = TraceCluster(Shape(2, 2), MODELS["70b"], config, 0)
    cluster.run(shifting_trace(1, (replace(half, duration_s=110.0),)))
    assert len(cluster.role_changes) <= 3
    assert all(when < 60 for when, _, _ in cluster.role_changes), "it settles"


def test_planner_leaves_a_load_alone_that_has_room() -> None:
    light = Half(60.0, 0.5, (500, 2_000), (20, 100))
    (row,) = run(Shape(2, 2), (light,), balance_roles=True)
    assert row.num_role_changes == 0
