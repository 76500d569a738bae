"""The planner's decisions from made-up snapshots: where the load says so, one at a time, and not back and forth."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.core.ids import WorkerKey
from penstock.protocol.messages import Role
from penstock.router.offered import WINDOW_S, OfferedLoad
from penstock.router.planner import (
    COOLDOWN_S,
    MIN_COMPUTED,
    MIN_REQUESTS,
    PAUSE_S,
    Bounds,
    Costs,
    Demand,
    Layout,
    Member,
    Planner,
    Snapshot,
    most_streams,
    strain_of,
)

# 100 streams fit the target of 0.1 s; together they give 1,000 tokens/s.
COSTS = Costs(0.05, 0.0005, 1.0, 1e6, 1 << 16, 10.0, 0.1)
CALM = Demand(1.0, 1000.0, 100.0, 0.1, 0.01, 1000.0, 0.0, 0, 1000, 1000)


def demand(*, prompts: float, answers: float, **changes: object) -> Demand:
    """In workers' worth: seconds of prompts a second, and thousands of tokens a second."""
    base = replace(CALM, requests_per_s=10.0, prefill_s=prompts / 10.0, output_tokens_per_s=1000.0 * answers)
    return replace(base, **changes)  # type: ignore[arg-type]


def members(prefill: int, decode: int, both: int = 0) -> tuple[Member, ...]:
    counts: list[tuple[Role, int]] = [("prefill", prefill), ("decode", decode), ("both", both)]
    return tuple(Member(WorkerKey(f"{role}-{i}", "e"), role, float(i)) for role, n in counts for i in range(n))


def ask(planner: Planner, load: Demand, *shape: int, now: float = 100.0, **changes: object) -> str:
    snapshot = replace(Snapshot(now, members(*shape), load, COSTS), **changes)  # type: ignore[arg-type]
    change = planner.decide(snapshot)
    return f"{change.worker.worker_id} {change.after}" if change is not None else ""


def test_capacity_of_a_worker_is_bounded_by_target_memory_and_batch() -> None:
    assert most_streams(CALM, COSTS) == pytest.approx(100.0)
    assert most_streams(CALM, replace(COSTS, kv_tokens=20_000.0)) == pytest.approx(20.0)
    assert most_streams(CALM, replace(COSTS, max_streams=7)) == 7
    assert most_streams(CALM, replace(COSTS, target_tpot_s=0.01)) == 1, "a target that no worker can keep"


def test_strain_of_each_leg_is_its_share_of_what_it_can_do() -> None:
    strain = strain_of(Layout(4, 4, 0), demand(prompts=2.0, answers=3.0), COSTS)
    assert strain.prefill == pytest.approx(0.5)
    assert strain.decode == pytest.approx(0.75)
    assert strain.total == pytest.approx(0.8, rel=0.1), "time per token against its target"
    piled = strain_of(Layout(4, 4, 0), demand(prompts=2.0, answers=3.0, num_streams=800), COSTS)
    assert piled.decode == pytest.approx(2.0), "streams that have piled up count whatever the rate says"


def test_without_a_worker_for_prompts_decode_computes_them_and_that_has_its_price() -> None:
    load = demand(prompts=0.5, answers=0.5)
    alone, apart = strain_of(Layout(0, 2, 0), load, COSTS), strain_of(Layout(1, 1, 0), load, COSTS)
    assert alone == strain_of(Layout(0, 0, 2), load, COSTS)
    assert alone.decode == pytest.approx(0.5)
    assert alone.total > apart.total


@pytest.mark.parametrize(
    ("load", "shape", "expected"),
    [
        (demand(prompts=3.5, answers=0.5), (2, 4), "decode-0 prefill"),
        (demand(prompts=0.5, answers=3.5), (4, 2), "prefill-0 decode"),
        (demand(prompts=2.0, answers=2.0), (4, 4), ""),
        (demand(prompts=0.2, answers=0.2), (4, 4), ""),  # both legs have room
        (demand(prompts=0.1, answers=1.2), (1, 1), "prefill-0 both"),
        (demand(prompts=3.0, answers=0.5), (1, 1), "decode-0 both"),  # someone has to decode
        (demand(prompts=3.0, answers=3.0), (0, 1), ""),  # one worker
        (demand(prompts=9.0, answers=0.1, num_requests=MIN_REQUESTS - 1), (2, 4), ""),
        (demand(prompts=9.0, answers=0.1, num_computed=MIN_COMPUTED - 1), (2, 4), ""),
    ],
)
def test_change_that_the_load_asks_for(load: Demand, shape: tuple[int, ...], expected: str) -> None:
    assert ask(Planner(), load, *shape) == expected


def test_reason_has_the_numbers() -> None:
    change = Planner().decide(Snapshot(0.0, members(2, 4), demand(prompts=3.5, answers=0.5), COSTS))
    assert change is not None
    assert change.reason.startswith("2P+4D at prefill 175%, decode 12%")
    assert "expected of 3P+3D: prefill 117%, decode 17%" in change.reason


def test_least_busy_worker_that_may_be_touched_changes() -> None:
    load = demand(prompts=3.5, answers=0.5)
    fixed = tuple(replace(m, is_fixed=m.key.worker_id == "decode-0") for m in members(2, 4))
    assert ask(Planner(), load, 2, 4, members=fixed) == "decode-1 prefill"
    all_fixed = tuple(replace(m, is_fixed=True) for m in members(2, 4))
    assert ask(Planner(), load, 2, 4, members=all_fixed) == ""


def test_bounds_are_kept() -> None:
    load = demand(prompts=3.5, answers=0.5)
    assert ask(Planner(), load, 2, 4, bounds=Bounds(min_decode=4)) == "decode-0 both"
    back = demand(prompts=0.5, answers=3.5)
    assert ask(Planner(), back, 4, 2, bounds=Bounds(min_prefill=4)) == "prefill-0 both"


def test_next_change_waits_and_a_change_back_waits_longer_unless_requests_starve() -> None:
    planner, more = Planner(), demand(prompts=3.5, answers=0.5)
    back = demand(prompts=0.5, answers=1.8)
    starving = demand(prompts=0.5, answers=9.0)
    assert ask(planner, more, 2, 4, now=100.0)
    assert ask(planner, more, 3, 3, now=100.0 + PAUSE_S / 2) == ""
    assert ask(planner, back, 4, 2, now=100.0 + PAUSE_S) == "", "not undone so soon"
    assert ask(planner, starving, 4, 2, now=100.0 + PAUSE_S) == "prefill-0 decode"
    assert ask(planner, more, 3, 3, now=100.0 + PAUSE_S + COOLDOWN_S) == "decode-0 prefill"


@pytest.mark.parametrize("prompts", [0.3, 1.0, 2.5, 4.0, 6.0, 9.0])
@pytest.mark.parametrize("answers", [0.3, 1.0, 2.5, 4.0, 6.0, 9.0])
def test_steady_load_comes_to_rest_wherever_it_starts(prompts: float, answers: float) -> None:
    """Whatever it changes it leaves alone afterwards, and no layout is visited twice."""
    for start in ((1, 7, 0), (4, 4, 0), (7, 1, 0), (0, 0, 8)):
        planner, counts, seen = Planner(), list(start), {start}
        for turn in range(100):
            change = planner.decide(
                Snapshot(turn * PAUSE_S, members(*counts), demand(prompts=prompts, answers=answers), COSTS)
            )
            if change is None:
                continue
            order = ("prefill", "decode", "both")
            counts[order.index(change.before)] -= 1
            counts[order.index(change.after)] += 1
            assert tuple(counts) not in seen, f"{counts} again"
            seen.add(tuple(counts))  # type: ignore[arg-type]
        assert len(seen) <= 9


# ---- the window


def test_window_forgets_what_is_older_and_counts_its_own_span() -> None:
    offered = OfferedLoad()
    for second in range(100):
        offered.note_request(10, float(second))
        offered.note_computed(0.5, 0.1, float(second))
        offered.note_answer(20, float(second))
        span_s, sums = offered.window(float(second))
        assert span_s == min(second, WINDOW_S)
        assert len(offered._slots) <= WINDOW_S + 1
    assert sums.num_requests == sums.num_computed == sums.num_answers == 31
    assert (sums.num_prompt_tokens, sums.num_output_tokens) == (310, 620)
    assert sums.prefill_s == pytest.approx(15.5)
    assert offered.window(1000.0)[1].num_requests == 0
    assert OfferedLoad().window(5.0)[0] == 0.0
