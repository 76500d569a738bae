"""The fault matrix over real processes: a cell of each kind, and the proof that it fails where nothing is done."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence

import pytest

from penstock.router.interface import GenerateRequest
from penstock.testing import real_matrix
from penstock.testing.fault import Aim, Target
from penstock.testing.fault_cell import Run, RunResult
from penstock.testing.fault_kinds import KINDS
from penstock.testing.fault_matrix import plan
from penstock.testing.fault_moments import Moment
from penstock.testing.real_cluster import Answered, RealCluster
from penstock.testing.real_fault import RealFault
from penstock.testing.real_faults import REAL_FAULTS, why_impossible
from penstock.testing.real_matrix import NUM_PAIRS, plan_real, run_real
from penstock.testing.seeds import quiet

KIND = {kind.name: kind for kind in KINDS}

# One run for each kind, at different moments, and the deaths of both sides where a hand-off is most exposed.
CELLS = [
    ("kill -9", Moment.MID_TRANSFER, Target.PREFILL),
    ("kill -9", Moment.ACK_LOST, Target.DECODE),
    ("kill -9", Moment.MID_STREAM, Target.DECODE),
    ("SIGTERM", Moment.MID_PREFILL, Target.PREFILL),
    ("SIGSTOP", Moment.FIRST_TOKEN, Target.DECODE),
    ("step error", Moment.PREFILL_CHOSEN, Target.PREFILL),
    ("silence", Moment.DECODE_UNAWARE, Target.TRANSFER),
    ("RST", Moment.HANDSHAKE, Target.PREFILL),
    ("1 Mbit/s", Moment.QUEUED, Target.TO_DECODE),
    ("5 % loss", Moment.MID_STREAM, Target.TO_DECODE),
    ("corrupt", Moment.MID_TRANSFER, Target.TRANSFER),
    ("truncated", Moment.FINISH, Target.TO_DECODE),
    ("repeated", Moment.HANDSHAKE, Target.TRANSFER),
    ("clock step", Moment.BEFORE_ACCEPT, Target.FORWARD),
    ("disk full", Moment.DECODE_QUEUED, Target.DECODE),
]

ROUNDS = 3

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def _play(cells: Sequence[tuple[str, Moment, Target]]) -> list[RunResult]:
    results: list[RunResult] = []
    runs = [Run(KIND[kind], moment, target, NUM_PAIRS) for kind, moment, target in cells]
    asyncio.run(run_real(runs, results.append))
    return results


def _was_missed(result: RunResult) -> bool:
    is_missed = result.why.startswith("missed") or "the fault did not happen" in result.why
    return result.outcome == "failed" and is_missed


def test_real_matrix_a_cell_of_each_kind_holds() -> None:
    possible = [cell for cell in CELLS if not why_impossible(cell[0])]
    results = _play(possible)
    for _ in range(ROUNDS):
        # On a busy machine a moment may be missed again and again, which says nothing of the product.
        missed = [cell for cell, result in zip(possible, results, strict=True) if _was_missed(result)]
        again = iter(_play(missed) if missed else [])
        results = [next(again) if _was_missed(result) else result for result in results]
    assert [f"{r.run.name}: {r.why}" for r in results if r.outcome == "failed"] == []
    assert len(results) == len(possible)
    assert {result.outcome for result in results} == {"ok", "resumed"}


@pytest.mark.parametrize("kind", ["kill -9", "SIGSTOP", "RST", "corrupt", "disk full"])
def test_real_fault_that_does_not_happen_is_a_failure(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, targets = REAL_FAULTS[kind]

    def dud(cluster: RealCluster, aim: Aim, rng: random.Random) -> RealFault:
        fault = make(cluster, aim, rng)
        fault.strike = lambda: None  # type: ignore[method-assign]
        return fault

    monkeypatch.setitem(REAL_FAULTS, kind, (dud, targets))
    monkeypatch.setattr(real_matrix, "MAX_PROVOKED", 3)
    [result] = _play([(kind, Moment.HANDSHAKE, targets[0])])
    assert result.outcome == "failed"
    assert "the fault did not happen" in result.why


def test_real_moment_that_never_comes_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_matrix._Play, "_on_told", lambda self, name, facts: None)
    monkeypatch.setattr(real_matrix, "MOMENT_S", 0.5)
    [result] = _play([("kill -9", Moment.MID_STREAM, Target.DECODE)])
    assert result.outcome == "failed"
    assert "missed 3 times: the moment 'mid-stream' never came" in result.why


def test_real_answer_with_another_token_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = RealCluster.ask

    async def tampered(self: RealCluster, request: GenerateRequest) -> Answered:
        seen = await ask(self, request)
        seen.tokens[0][-1] ^= 1
        return seen

    monkeypatch.setattr(RealCluster, "ask", tampered)
    [result] = _play([("clock step", Moment.FIRST_TOKEN, Target.BACK)])
    assert "got other tokens than without the fault" in result.why


def test_real_plan_covers_every_kind_and_moment() -> None:
    runs = plan_real(KINDS, tuple(Moment))
    assert {(run.kind.name, run.moment) for run in runs} == {
        (run.kind.name, run.moment) for run in plan(KINDS, tuple(Moment))
    }
