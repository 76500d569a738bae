"""The fault matrix on virtual time, and the proof that it can fail: at faults that do not happen, at moments that never
come, at planted bugs, at errors that nobody declared.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType

import pytest

from penstock.core.ids import WorkerKey
from penstock.protocol import codec
from penstock.protocol.messages import Abort, FromRouter
from penstock.router.config import RouterConfig
from penstock.testing import fault_cell
from penstock.testing.fault import Aim, Fault, Target
from penstock.testing.fault_cell import Run, RunResult, run_once
from penstock.testing.fault_clock import SteppedWallClock
from penstock.testing.fault_cluster import FaultCluster
from penstock.testing.fault_kinds import KINDS, Kind
from penstock.testing.fault_links import cut_short, flip_a_byte
from penstock.testing.fault_matrix import Matrix, main, plan, render, run_all, run_quietly
from penstock.testing.fault_moments import Moment, MomentWatch
from penstock.testing.fault_tap import decodes
from penstock.testing.planted.catalog import planted
from penstock.testing.tap import ROUTER, Crossing

KIND = {kind.name: kind for kind in KINDS}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_matrix_every_cell_holds_and_every_fault_happened() -> None:
    matrix = run_all(plan(KINDS, tuple(Moment)), processes=min(2, os.cpu_count() or 1))
    assert not matrix.failures, "\n".join(f"{r.run.name}: {r.why}" for r in matrix.failures[:5])
    assert len(matrix.results) == 14 * 12
    assert not matrix.reasons
    outcomes = {result.outcome for results in matrix.results.values() for result in results}
    assert outcomes == {"ok", "resumed", "error"}


def test_matrix_errors_only_where_the_front_itself_ends() -> None:
    results = [run_quietly(run) for run in plan(KINDS, (Moment.MID_STREAM,), pairs=(1,))]
    assert {r.run.target for r in results if r.outcome == "error"} == {Target.ROUTER}
    declared = {r.run.kind.name for r in results if r.outcome == "error"}
    assert declared == {"kill -9", "OOM kill", "disk full"}  # a drain lets a running stream finish


def _dud(kind: Kind) -> Kind:
    """The same fault, which looks on and does nothing."""

    def make(cluster: FaultCluster, aim: Aim, rng: random.Random) -> Fault:
        fault = kind.make(cluster, aim, rng)
        fault.strike = lambda: None  # type: ignore[method-assign]
        return fault

    return replace(kind, make=make)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_fault_that_does_not_happen_is_a_failure_for_every_target(kind: Kind) -> None:
    for target in kind.targets:
        result = run_quietly(Run(_dud(kind), Moment.MID_TRANSFER, target, 1))
        assert result.outcome == "failed", target
        assert "the fault did not happen" in result.why, result.why


@pytest.mark.parametrize("moment", list(Moment), ids=lambda moment: moment.value)
def test_moment_that_never_comes_is_a_failure(moment: Moment, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(MomentWatch):
        def _happened(self, moment: Moment) -> None:
            return

    monkeypatch.setattr(fault_cell, "MomentWatch", Blind)
    result = run_quietly(Run(KIND["kill -9"], moment, Target.DECODE, 1))
    assert (result.outcome, f"the moment {moment.value!r} never came" in result.why) == ("failed", True)


def test_moments_come_in_the_order_of_a_life(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Moment, float] = {}

    class Noting(MomentWatch):
        def _happened(self, moment: Moment) -> None:
            super()._happened(moment)
            seen.update(self.seen)

    monkeypatch.setattr(fault_cell, "MomentWatch", Noting)
    assert run_quietly(Run(KIND["clock step"], Moment.FINISH, Target.FORWARD, 1)).outcome == "ok"
    assert set(Moment) - set(seen) <= {Moment.QUEUED, Moment.DECODE_QUEUED}
    lived = [Moment.BEFORE_ACCEPT, Moment.PREFILL_CHOSEN, Moment.MID_PREFILL, Moment.DECODE_UNAWARE, Moment.ACK_LOST]
    times = [seen[moment] for moment in (*lived, Moment.FIRST_TOKEN, Moment.MID_STREAM, Moment.FINISH)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("bug", "kind", "moment", "why"),
    [
        ("lose-failed", "step error", Moment.MID_PREFILL, "I8"),
        ("skip-index", "clock step", Moment.FIRST_TOKEN, "is not served"),
    ],
)
def test_matrix_fails_with_a_planted_bug(bug: str, kind: str, moment: Moment, why: str) -> None:
    with planted(bug):
        results = [run_quietly(run) for run in plan((KIND[kind],), (moment,), (1,))]
    assert any(why in result.why for result in results), [result.why for result in results]


def test_error_that_is_not_declared_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    shape_of = fault_cell.shape_of
    monkeypatch.setattr(fault_cell, "shape_of", lambda run: replace(shape_of(run), router=RouterConfig(max_attempts=1)))
    result = run_quietly(Run(KIND["step error"], Moment.MID_PREFILL, Target.PREFILL, 1))
    assert result.outcome == "failed"
    assert "ended with internal_error" in result.why


def test_block_that_is_not_given_back_is_a_failure() -> None:
    step = KIND["clock step"]

    def make(cluster: FaultCluster, aim: Aim, rng: random.Random) -> Fault:
        cluster.worker(aim.decode).pool.allocate(1)
        return step.make(cluster, aim, rng)

    result = run_quietly(Run(replace(step, make=make), Moment.FIRST_TOKEN, Target.BACK, 1))
    assert result.outcome == "failed"
    assert result.why.startswith("I4 decode-0")


def test_process_that_does_not_come_back_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_cell, "RETURN_S", 0.01)
    result = run_quietly(Run(KIND["kill -9"], Moment.FINISH, Target.DECODE, 2))
    assert "not every process came back" in result.why


def test_same_run_ends_the_same_way_twice() -> None:
    run = Run(KIND["5 % loss"], Moment.HANDSHAKE, Target.TRANSFER, 2)
    assert run_quietly(run) == run_quietly(run)


def test_run_tells_its_story_on_request() -> None:
    lines: list[str] = []
    run_once(Run(KIND["repeated"], Moment.HANDSHAKE, Target.TRANSFER, 1), lines.append)
    assert any("the moment has come" in line for line in lines)


@pytest.mark.parametrize("change", [flip_a_byte(random.Random(0)), cut_short], ids=["flipped", "cut short"])
def test_spoiled_frame_differs_and_is_refused(change: Callable[[Crossing, bytes], bytes]) -> None:
    message = Abort("r", 1)
    frame = codec.from_router.encode(FromRouter("0123456789abcdef", 1, message))
    crossing = Crossing(ROUTER, WorkerKey("decode-0", "0123456789abcdef"), message, 0.0)
    assert decodes(crossing, frame)
    spoiled = change(crossing, frame)
    assert spoiled != frame
    assert not decodes(crossing, spoiled)


def test_stepped_clock_is_read_by_everyone_and_names_readers_of_the_product() -> None:
    clock, true = SteppedWallClock(), time.time
    clock.step(60.0)
    try:
        assert time.time() - true() > 59
        assert time.time_ns() / 1e9 - true() > 59
        assert not clock.readers
        FunctionType(_reads_time.__code__, {"__name__": "penstock.router.core", "time": time})()
        assert clock.readers == {"penstock.router.core"}
    finally:
        clock.close()
    assert time.time is true


def _reads_time() -> float:
    return time.time()


def test_render_marks_a_declared_error_with_a_star_and_shows_the_worst() -> None:
    kind, matrix = KIND["kill -9"], Matrix()
    for target, outcome in ((Target.PREFILL, "ok"), (Target.DECODE, "resumed"), (Target.ROUTER, "error")):
        matrix.add(RunResult(Run(kind, Moment.QUEUED, target, 1), outcome))
    matrix.add(RunResult(Run(kind, Moment.FINISH, Target.DECODE, 1), "failed", "because"))
    assert matrix.outcome((kind.name, Moment.QUEUED.value)) == "resumed*"
    assert matrix.outcome((kind.name, Moment.FINISH.value)) == "failed"
    text = render(matrix, (kind,), (Moment.QUEUED, Moment.FINISH))
    assert text.splitlines()[-2].split() == ["kill", "-9", "resumed*", "failed"]


def test_command_prints_the_table_and_writes_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "matrix.json"
    assert main(["--kind", "RST", "--moment", "handshake", "--json", str(file)]) == 0
    shown = capsys.readouterr()
    assert "1 cells" in shown.out
    assert "RST" in shown.err
    rows = json.loads(file.read_text())
    assert {row["target"] for row in rows} == {"P", "D", "router"}
    assert {row["pairs"] for row in rows} == {1, 2}


def test_command_ends_with_one_when_a_cell_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with planted("skip-index"):
        assert main(["--kind", "RST", "--moment", "mid-stream"]) == 1
    assert "FAIL  RST of " in capsys.readouterr().out


def test_command_names_the_kinds_when_none_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kind", "earthquake"]) == 2
    assert "SIGSTOP" in capsys.readouterr().err
