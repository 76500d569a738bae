"""The seeded simulation of the whole cluster, and the proof that its checkers can fail."""

from __future__ import annotations

import os

import pytest

from penstock.testing.planted import BUGS
from penstock.testing.scenario import Outcome, draw_scenario, run_scenario
from penstock.testing.simulate import main, replay_command, run_seed, run_seeds

NUM_SEEDS = int(os.environ.get("PENSTOCK_SEEDS", "1000"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_simulation_thousand_seeds_hold_every_invariant() -> None:
    outcomes, failures = run_seeds(range(NUM_SEEDS), processes=min(2, os.cpu_count() or 1))
    assert not failures, "\n".join(failures[:5])
    faults = sum((outcome.faults for outcome in outcomes), start=outcomes[0].faults.__class__())
    kinds = {name.split()[0] for name in faults}
    assert kinds >= {"drop", "double", "reorder", "slow", "kill", "freeze", "corrupt", "cut"}, kinds
    assert sum(outcome.num_retries for outcome in outcomes) > 0
    assert sum(outcome.num_preemptions for outcome in outcomes) > sum(outcome.num_parked for outcome in outcomes) > 0
    assert sum(outcome.num_unparked for outcome in outcomes) > 0
    assert faults["corrupt parked"] > 0


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_simulation_planted_bug_is_caught(bug: str) -> None:
    _, failures = run_seeds(range(60), bug=bug)
    assert failures, f"no seed of 60 notices {bug}"
    assert replay_command(int(failures[0].split()[1].rstrip(":")), bug) in failures[0]


def test_simulation_failing_seed_fails_again_when_replayed() -> None:
    _, failures = run_seeds(range(30), bug="lose-failed")
    seed = int(failures[0].split()[1].rstrip(":"))
    assert run_seed(seed, bug="lose-failed") == failures[0]


def test_simulation_same_seed_gives_same_outcome() -> None:
    assert run_seed(7) == run_seed(7)


def test_simulation_perfect_network_ends_every_request_well() -> None:
    outcomes = [run_scenario(draw_scenario(seed)) for seed in range(0, 200, 10)]
    assert all(isinstance(outcome, Outcome) for outcome in outcomes)
    assert sum(outcome.num_requests for outcome in outcomes) > 0
    assert not any(name.startswith(("drop", "kill")) for outcome in outcomes for name in outcome.faults)


def test_simulate_command_reports_rate_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "0..3"]) == 0
    assert "3 seeds, 0 failed" in capsys.readouterr().out
    assert main(["--seeds", "0..30", "--bug", "lose-failed"]) == 1
    assert "--bug lose-failed" in capsys.readouterr().out
