"""The seeded simulation of the whole cluster: every invariant holds, runs replay, and stories can be read."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.testing.chaos import ChaosProfile
from penstock.testing.history import check_history, read_history
from penstock.testing.invariants import INVARIANTS
from penstock.testing.planted.catalog import plant_of
from penstock.testing.scenario import Outcome, draw_scenario, run_scenario
from penstock.testing.seeds import Failure, replay_command, run_seed, run_seeds
from penstock.testing.simulate import main

NUM_SEEDS = int(os.environ.get("PENSTOCK_SEEDS", "1000"))
KINDS = {
    "drop",
    "double",
    "reorder",
    "slow",
    "kill",
    "freeze",
    "hang",
    "drain",
    "corrupt",
    "cut",
    "replay",
    "unknown",
    "refused",
    "role",
}


def first_failure(bug: str) -> Failure:
    results = run_seeds(range(100), bug=bug, plant=plant_of(bug))
    return next(result for result in results if isinstance(result, Failure))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_simulation_thousand_seeds_hold_every_invariant() -> None:
    results = list(run_seeds(range(NUM_SEEDS), processes=min(2, os.cpu_count() or 1)))
    failures = [str(result) for result in results if isinstance(result, Failure)]
    assert not failures, "\n".join(failures[:5])
    outcomes = [result for result in results if isinstance(result, Outcome)]
    faults = sum((outcome.faults for outcome in outcomes), start=Counter[str]())
    assert {name.split()[0] for name in faults} >= KINDS
    assert sum(outcome.num_retries for outcome in outcomes) > 0
    assert sum(outcome.num_preemptions for outcome in outcomes) > sum(outcome.num_parked for outcome in outcomes) > 0
    assert sum(outcome.num_unparked for outcome in outcomes) > 0
    assert faults["corrupt parked"] > 0


def test_simulation_failing_seed_fails_again_when_replayed() -> None:
    failure = first_failure("lose-failed")
    assert run_seed(failure.seed, bug="lose-failed", plant=plant_of("lose-failed")) == failure
    assert replay_command(failure.seed, "lose-failed") in str(failure)
    assert failure.name in INVARIANTS


def test_simulation_same_seed_gives_same_outcome() -> None:
    assert run_seed(7) == run_seed(7)


def test_simulation_perfect_network_ends_every_request_well() -> None:
    outcomes = [run_scenario(draw_scenario(seed)) for seed in range(0, 200, 10)]
    assert sum(outcome.num_requests for outcome in outcomes) > 0
    assert sum(outcome.num_retries for outcome in outcomes) == 0
    assert not any(name.startswith(("drop", "kill")) for outcome in outcomes for name in outcome.faults)


def test_scenario_that_is_perfect_by_chance_has_the_room_of_one_that_is_by_design(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ChaosProfile, "draw", lambda rng: ChaosProfile())
    scenarios = [draw_scenario(seed) for seed in range(1, 5)]
    assert all(scenario.profile.is_perfect and scenario.shape.max_early == 1024 for scenario in scenarios)


def test_simulation_perfect_network_with_little_room_on_workers_refuses_nothing() -> None:
    for seed in range(0, 200, 10):
        scenario = draw_scenario(seed)
        # Two routers may send their last request to the same place.
        cramped = replace(scenario, shape=replace(scenario.shape, max_requests=1 + seed % 3), second=None)
        assert run_scenario(cramped).num_retries == 0


def test_simulation_of_a_seed_writes_a_history_that_holds(tmp_path: Path) -> None:
    path = tmp_path / "history"
    for seed in (3, 10, 16):
        assert main(["--seed", str(seed), "--history", str(path)]) == 0
        checker = check_history(read_history(path))
        assert checker.violations == []
        assert checker.num_requests > 0
        assert checker.num_tokens > 0


def test_simulate_command_reports_rate_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "0..3"]) == 0
    assert "3 seeds, 0 failed" in capsys.readouterr().out
    assert main(["--seeds", "0..30", "--bug", "lose-failed"]) == 1
    assert "--bug lose-failed" in capsys.readouterr().out


def test_simulate_trace_tells_a_readable_story(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "10", "--trace"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(" → router  Hello role prefill" in line for line in lines)
    assert any("router → decode-0." in line and "StartDecode r" in line and "ids" in line for line in lines)
    assert any(" ends: well" in line for line in lines)
    assert max(map(len, lines)) < 600
    assert not any("b'" in line or "\\x" in line for line in lines), "bytes are shortened"


def test_simulate_trace_of_a_failure_ends_with_the_state_of_the_pools(capsys: pytest.CaptureFixture[str]) -> None:
    failure = first_failure("free-early")
    assert main(["--seed", str(failure.seed), "--trace", "--bug", "free-early"]) == 1
    told = capsys.readouterr().err
    assert "router: " in told.splitlines()[-1] or "blocks free" in told
    assert "holds blocks [" in told
