"""An engine that hangs while its worker's heartbeats go on (I13), on the simulated cluster."""

from __future__ import annotations

import pytest

from penstock.protocol.sampling import SamplingParams
from penstock.router.config import RouterConfig
from penstock.router.interface import GenerateRequest
from penstock.testing.chaos import ChaosProfile
from penstock.testing.cluster import ClusterShape, SimCluster

MAX_STEP_S = 2.0


def run(victim: str, *, hang_s: float, at_s: float = 0.003, max_step_s: float = MAX_STEP_S) -> SimCluster:
    """Six requests on 2 + 2 workers; `victim` hangs `at_s` after they came. Until all has long been over."""
    router = RouterConfig(policy="round-robin")
    shape = ClusterShape(num_prefill=2, num_decode=2, num_blocks=64, max_step_s=max_step_s, router=router)
    cluster = SimCluster(shape, ChaosProfile(by_hand=True), seed=1)
    for i in range(6):
        params = SamplingParams(max_tokens=12, seed=i, ignore_eos=True)
        request = GenerateRequest(f"r{i}", list(range(1, 9 + i)), params, 60.0)
        cluster.events.after(1.0, lambda r=request: cluster.submit(r))  # type: ignore[misc]
    cluster.events.after(1.0 + at_s, lambda: cluster.hang_worker(victim, hang_s))
    until = cluster.clock.now() + 1.0 + hang_s + 60.0
    while cluster.clock.now() < until and cluster.events.run_next():
        continue
    cluster.check_at_rest()
    return cluster


def states(cluster: SimCluster) -> dict[str, str]:
    return {row.worker_id: row.state for row in cluster.router.status().workers}


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("at_s", [0.001, 0.004, 0.01])
def test_requests_of_a_hung_engine_end_elsewhere_and_exactly(victim: str, at_s: float) -> None:
    cluster = run(victim, hang_s=30.0, at_s=at_s)
    assert cluster.router.counters.workers_stalled == 1
    assert cluster.router.counters.workers_lost == 0, "its heartbeats went on"
    ends = [record.end for record in cluster.journal.records.values()]
    assert [end.error for end in ends if end is not None] == [None] * 6
    assert states(cluster)[victim] == "ready", "it turned again and was taken back"


def test_decode_engine_that_hangs_costs_each_of_its_streams_one_resumption() -> None:
    cluster = run("decode-0", hang_s=30.0, at_s=0.02)
    ends = [record.end for record in cluster.journal.records.values()]
    resumed = [end.resumed for end in ends if end is not None]
    assert sum(resumed) == cluster.router.counters.resumed == 3
    assert max(resumed) == 1


def test_engine_that_hangs_for_ever_still_costs_no_request() -> None:
    cluster = run("decode-1", hang_s=300.0, at_s=0.004)
    assert [r.end.error for r in cluster.journal.records.values() if r.end is not None] == [None] * 6


def test_long_step_within_the_bound_moves_nobody() -> None:
    cluster = run("decode-0", hang_s=1.5)
    assert cluster.router.counters.workers_stalled == 0
    assert cluster.router.counters.retries == 0


def test_without_the_bound_a_hung_engine_holds_its_streams() -> None:
    """The proof that the tests above can fail: with a bound beyond the hang nothing is noticed."""
    cluster = run("decode-0", hang_s=30.0, at_s=0.02, max_step_s=1000.0)
    assert cluster.router.counters.resumed == 0
    assert cluster.router.counters.workers_stalled == 0
