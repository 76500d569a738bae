"""Real processes that are killed, frozen and cut off under live streams: the small version of benchmarks/faults.py."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from penstock.testing.fault_run import ENVIRONMENT, FaultPlan, FaultResult, run_faults, wrong_answers
from penstock.testing.live_streams import StreamRecord, read_stream
from penstock.testing.process_faults import FaultKind, lines_since
from penstock.testing.serving import serving
from penstock.worker.fault_signal import DIE_VERIFYING, DYING

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(500)]

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


REPEATING = "The colours are red, green, blue, black, white. " * 6


def test_worker_that_dies_within_a_verify_step_loses_and_doubles_no_token(model_path: Path) -> None:
    """The draft is computed and judged, and nobody knows of it yet: the stream goes on elsewhere to the same tokens."""
    options = ("--dtype", "float32", "--kv-cache-mib", "128", "--decode", "2", "--speculative", "suffix")
    body = {
        "model": "smollm2-135m-instruct",
        "prompt": REPEATING,
        "max_tokens": 96,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
    }
    with serving(*options, environment=ENVIRONMENT) as cluster:
        expected = read_stream(cluster, 0, body)
        assert (expected.error, expected.resumed) == ("", 0)
        offset, record = cluster.log.stat().st_size, StreamRecord(0, time.monotonic())
        stream = threading.Thread(target=read_stream, args=(cluster, 0, body, record))
        stream.start()
        while not record.times:
            time.sleep(0.002)
        for name, row in cluster.workers().items():
            if name.startswith("decode"):
                os.kill(int(row["pid"]), DIE_VERIFYING)
        stream.join()
        deaths = lines_since(cluster, offset, rf"{DYING} [1-9]\d* drafted tokens")
        assert len(deaths) >= 1, cluster.tail()
        assert (record.error, record.resumed) == ("", len(deaths))
        assert record.choices[0].difference(expected.choices[0]) == ""
        cluster.wait_rest(60)
