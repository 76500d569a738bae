"""Real processes that are killed, frozen and cut off under live streams: the small version of benchmarks/faults.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.testing.fault_run import ENVIRONMENT, FaultPlan, FaultResult, run_faults, wrong_answers
from penstock.testing.process_faults import FaultKind
from penstock.testing.serving import serving

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(500)]

PLAN = FaultPlan(moments=6, streams=8, seed=3)


@pytest.fixture(scope="module")
def result(model_path: Path) -> FaultResult:
    options = ("--dtype", "float32", "--kv-cache-mib", "128", "--prefill", "2", "--decode", "2")
    with serving(*options, environment=ENVIRONMENT) as cluster:
        return run_faults(cluster, PLAN)


def test_every_stream_ends_well(result: FaultResult) -> None:
    assert [record.error for record in result.records if record.error] == []
    assert len(result.records) > PLAN.streams
    assert {moment.struck.kind for moment in result.moments} == set(FaultKind)


def test_every_answer_is_that_of_the_undisturbed_run(result: FaultResult) -> None:
    assert wrong_answers(result) == []


def test_some_streams_were_resumed(result: FaultResult) -> None:
    assert sum(record.resumed for record in result.records) > 0


def test_router_notices_what_was_done(result: FaultResult) -> None:
    dead = [moment for moment in result.moments if moment.struck.kind is not FaultKind.LINK]
    assert all(moment.noticed_s is not None for moment in dead)


def test_no_survivor_holds_a_block_for_nobody(result: FaultResult) -> None:
    assert all(moment.unstranded_s is not None for moment in result.moments)


def test_nothing_is_leaked(result: FaultResult) -> None:
    assert result.leaks == {}
    assert result.shared_memory_left == []
