"""Hand-made situations: each part dominant once, an idle cluster, an old one; quantiles against exact ones."""

from __future__ import annotations

import random
from statistics import fmean
from typing import Any

import msgspec
import numpy as np
import pytest

from penstock.core.quantiles import quantile
from penstock.gateway.explain.bottleneck import ITL_CAUSES, TTFT_CAUSES
from penstock.gateway.explain.parts import ITL_PARTS, TTFT_PARTS
from penstock.gateway.explain.quantiles import shares_around
from penstock.gateway.explain.report import Explanation, WorkerUse
from penstock.gateway.explain.summary import explain, latency, report_request
from penstock.gateway.explain.usage import batch_of, step_line, worker_uses
from penstock.gateway.explain.what_if import _tpot
from penstock.gateway.explain.window import RequestFacts, Sample, Window, WorkerSample
from penstock.protocol.messages import WorkerLoad
from penstock.router.interface import ClusterStatus, WorkerStatus

BASE_MS = 1


def facts(number: int, at_s: float, **ms: float) -> RequestFacts:
    """A request in which every part takes BASE_MS but for those named."""
    parts = tuple(round(1000 * ms.get(name, BASE_MS)) for name in TTFT_PARTS)
    work_s = (ms.get("prefill_compute", BASE_MS) + ms.get("first_step", BASE_MS)) / 1e3
    return RequestFacts(
        f"cmpl-{number}-0",
        f"label-{number}",
        at_s,
        parts,
        (0, 0, 0, 0),
        1.0,
        0.5,
        work_s,
        100,
        0,
        50,
        "decode-0",
        "prefill-0",
        transfer_s=0.01,
        transferred_bytes=1_000_000,
    )


def status(
    busy_s: float = 0.0, steps: int = 0, waiting: int = 0, running: int = 1, queued: int = 0, prefill: int = 1
) -> ClusterStatus:
    load = WorkerLoad(total_blocks=1000, free_blocks=900, busy_s=busy_s, steps=steps, prefill_tokens=100 * steps)

    def row(name: str, role: Any) -> WorkerStatus:
        epoch = "0" * 16
        return WorkerStatus(name, epoch, role, 1, "ready", load, running, waiting, 900, 1000, block_size=16)

    workers = [*(row(f"prefill-{i}", "prefill") for i in range(prefill)), row("decode-0", "decode")]
    return ClusterStatus(True, "", "auto", workers, 1, queued)


def explained(window: Window) -> Explanation:
    found = explain(window, 60.0, 60.0)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Explanation) == found
    return found


@pytest.mark.parametrize("cause", TTFT_CAUSES, ids=lambda cause: cause.name)
def test_cause_that_dominates_is_named_with_its_evidence(cause: Any) -> None:
    window = Window()
    window.note_status(0.0, status(queued=3))
    window.note_status(50.0, status(busy_s=40.0, steps=100, waiting=7))
    for number in range(40):
        window.note_request(facts(number, float(number), **{cause.parts[0]: 200.0}))
    found = explained(window)
    assert found.bottleneck.name == cause.name, "no pool is busier than the other"
    assert "share of TTFT: 9" in found.bottleneck.evidence[0]
    assert "1 prefill worker: 80% busy, up to 7 waiting, KV use up to 10%" in found.bottleneck.evidence
    assert "up to 3 requests in the router's queue" in found.bottleneck.evidence
    assert "40 hand-offs, 100 MB/s while one is on its way" in found.bottleneck.evidence


@pytest.mark.parametrize(
    ("prefill_s", "decode_s", "free_blocks", "name"),
    [
        (45.0, 10.0, 500, "prefill-queue"),
        (45.0, 10.0, 50, "router-queue"),  # decode is full
        (10.0, 45.0, 500, "router-queue"),  # decode is busier
    ],
)
def test_queue_in_the_router_is_prefills_when_decode_has_blocks_to_spare(
    prefill_s: float, decode_s: float, free_blocks: int, name: str
) -> None:
    window = Window()
    for at_s, share in ((0.0, 0.01), (50.0, 1.0)):
        rows = [
            msgspec.structs.replace(row, load=WorkerLoad(busy_s=busy_s * share), free_blocks=free_blocks)
            for row, busy_s in zip(status().workers, (prefill_s, decode_s), strict=True)
        ]
        window.note_status(at_s, msgspec.structs.replace(status(queued=9), workers=rows))
    for number in range(40):
        window.note_request(facts(number, float(number), queue=200.0, prefill_queue=50.0))
    found = explained(window).bottleneck
    assert found.name == name
    assert ("add prefill workers" in found.sentence) == (name == "prefill-queue")


def test_queues_from_before_the_window_are_replayed_and_not_counted() -> None:
    whole, cut = loaded_window(), loaded_window()
    late = explain(cut, 60.0, 56.0)  # the first requests ended four seconds in and before
    assert 20 < late.requests < explain(whole, 60.0, 60.0).requests
    assert late.what_if.error == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("cause", ITL_CAUSES, ids=lambda cause: cause.name)
def test_cause_of_slow_streams_is_named(cause: Any) -> None:
    window = Window()
    for number in range(50):
        window.note_gap(float(number), tuple(20_000 if name in cause.parts else 1_000 for name in ITL_PARTS))
    found = explained(window)
    assert found.stream_bottleneck.name == cause.name
    assert found.itl.count == 50


def test_every_part_has_exactly_one_cause() -> None:
    assert sorted(part for cause in TTFT_CAUSES for part in cause.parts) == sorted(TTFT_PARTS)
    assert sorted(part for cause in ITL_CAUSES for part in cause.parts) == sorted(ITL_PARTS)


def test_idle_and_empty_clusters_are_called_idle() -> None:
    found = explained(Window())
    assert (found.bottleneck.name, found.stream_bottleneck.name, found.requests) == ("idle", "idle", 0)
    assert found.workers == []
    window = Window()
    window.note_request(facts(1, -100.0))
    assert explained(window).bottleneck.name == "idle", "what lies before the window does not count"


def test_requests_that_failed_before_their_first_token_count_as_failed_only() -> None:
    window = Window()
    window.note_request(facts(1, 1.0)._replace(ttft_us=(0,) * len(TTFT_PARTS), error="overloaded"))
    found = explained(window)
    assert (found.requests, found.failed, found.ttft.count) == (1, 1, 0)


def test_columns_add_up_to_the_latency() -> None:
    rng = random.Random(3)
    measured = [tuple(rng.randrange(0, 10 ** rng.randrange(1, 7)) for _ in TTFT_PARTS) for _ in range(777)]
    found = latency(TTFT_PARTS, measured)
    for name in ("p50", "p90", "p99", "mean"):
        assert sum(getattr(row.ms, name) for row in found.parts) == pytest.approx(getattr(found.ms, name))
        assert sum(getattr(row.share, name) for row in found.parts) == pytest.approx(1.0)
    sums = np.array([sum(parts) for parts in measured]) / 1e3
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert getattr(found.ms, name) == pytest.approx(float(np.quantile(sums, q, method="inverted_cdf")))
    assert found.ms.mean == pytest.approx(fmean(sums))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 1000])
def test_quantiles_equal_exact_ones(count: int) -> None:
    rng = random.Random(count)
    values = [rng.random() for _ in range(count)]
    for q in (0.0, 0.01, 0.5, 0.9, 0.99, 1.0):
        assert quantile(values, q) == float(np.quantile(values, q, method="inverted_cdf"))
    assert quantile([], 0.5) == 0.0


def test_shares_of_the_slow_ones_are_those_of_the_slow_ones() -> None:
    measured = [(1000, 0)] * 80 + [(1000, 9000)] * 20
    assert shares_around(measured, 0.5) == (1.0, 0.0)
    assert shares_around(measured, 0.9) == (0.1, 0.9)


def test_window_forgets_the_oldest() -> None:
    window = Window(max_requests=3, max_gaps=2, max_samples=2)
    for number in range(10):
        window.note_request(facts(number, float(number)))
        window.note_gap(float(number), (1, 2, 3, 4))
        window.note_status(float(number), status())
    assert [request.request_id for request in window.requests(0.0)] == ["cmpl-7-0", "cmpl-8-0", "cmpl-9-0"]
    assert (len(window.gaps(0.0)), len(window.samples(0.0))) == (2, 2)


@pytest.mark.parametrize("name", ["cmpl-2-0", "cmpl-2", "label-2"])
def test_request_is_found_by_each_of_its_names(name: str) -> None:
    window = Window()
    for number in range(3):
        window.note_request(facts(number, float(number), transfer=5.0))
    (found,) = window.find(name)
    report = report_request(found, 10.0)
    assert report.request_id == "cmpl-2-0"
    assert sum(report.ttft.values()) == pytest.approx(report.ttft_ms) == pytest.approx(len(TTFT_PARTS) + 4)
    assert window.find("cmpl-9") == []


def sample(at_s: float, **changes: Any) -> Sample:
    base = WorkerSample("d", "e", "decode", "ready", 0.0, 0, 0, 0, 0, 0, 0, 0, 10, 10, 16, 0)
    return Sample(at_s, 0, 0, (base._replace(**changes),))


def test_use_of_a_worker_is_that_of_its_last_incarnation() -> None:
    samples = [
        sample(0.0, epoch="old", busy_s=100.0, steps=50, running=9),
        sample(10.0, busy_s=1.0, steps=10, running=2, decode_tokens=5),
        sample(20.0, busy_s=6.0, steps=60, running=4, decode_tokens=105, waiting=3, free_blocks=4),
    ]
    (found,) = worker_uses(samples)
    expected = WorkerUse("d", "decode", "ready", 0.5, 3.0, 1.5, 3, 0.6, 0.0, 10.0, 100.0)
    assert found == msgspec.structs.replace(expected, kv_used=pytest.approx(0.6))


def test_worker_that_tells_no_times_has_no_utilisation() -> None:
    (found,) = worker_uses([sample(0.0), sample(10.0, steps=10)])
    assert (found.utilisation, found.decode_tokens_per_s, found.step_ms) == (None, None, None)


def test_step_line_finds_the_line_and_only_where_there_is_one() -> None:
    rng, samples, busy_s, steps = random.Random(1), [], 0.0, 0
    for second in range(20):
        running = rng.randrange(1, 30)
        samples += [sample(2.0 * second, busy_s=busy_s, steps=steps, running=running)]
        busy_s, steps = busy_s + 10 * (0.005 + 0.001 * running), steps + 10
        samples += [sample(2.0 * second + 1, busy_s=busy_s, steps=steps, running=running)]
    found = step_line(samples)
    assert found is not None
    assert found == pytest.approx((0.005, 0.001), rel=1e-6)
    assert step_line(samples[:4]) is None
    assert step_line([s for s in samples if s.workers[0].running == samples[0].workers[0].running]) is None


def test_more_decode_workers_shorten_steps_down_to_those_of_one_sequence() -> None:
    rng, samples, busy_s, steps = random.Random(1), [], 0.0, 0
    for second in range(40):
        running = rng.choice((0, 8, 16))
        samples += [sample(float(second), busy_s=busy_s, steps=steps, running=running)]
        busy_s, steps = busy_s + 10 * (0.010 + 0.001 * running), steps + 10
    assert batch_of(samples) == pytest.approx(fmean(s.workers[0].running for s in samples if s.workers[0].running))
    assert batch_of([]) == 1.0
    assert _tpot((0.010, 0.001), 10.0, 0.5) == pytest.approx(0.015 / 0.020 - 1)
    assert _tpot((0.010, 0.001), 1.0, 0.5) == 0.0
    assert _tpot(None, 5.0, 0.5) is None


def loaded_window(prefill: int = 1) -> Window:
    """Prompts of 100 ms come every 90 ms: the prefill worker cannot keep up."""
    window, free, queued_ms = Window(), 0.0, 0.0
    for number in range(100):
        at_s = number * 0.09
        start = max(free, at_s)
        free, queued_ms = start + 0.1, (start - at_s) * 1e3
        window.note_request(facts(number, at_s, prefill_queue=queued_ms, prefill_compute=99.0, queue=0.0, retry=0.0))
    window.note_status(0.0, status(prefill=prefill))
    window.note_status(50.0, status(busy_s=49.0, steps=100, prefill=prefill))
    return window


def test_another_prefill_worker_would_end_a_prefill_queue() -> None:
    found = explained(loaded_window())
    assert found.bottleneck.name == "prefill-queue"
    assert found.what_if.why_not == ""
    assert found.what_if.error == pytest.approx(0.0, abs=0.05)
    changes = {change.change: change for change in found.what_if.changes}
    assert changes["+1 prefill worker"].ttft_p90 < -0.8
    assert changes["+1 decode worker"].ttft_p90 == pytest.approx(0.0, abs=1e-9)


def test_replay_that_does_not_fit_gives_no_figures() -> None:
    window = loaded_window(prefill=3)  # the figures say one worker, the cluster has three
    found = explained(window).what_if
    assert found.changes == []
    assert "not in the model" in found.why_not
    assert found.error is not None
    assert found.error < -0.3


def test_few_requests_are_not_replayed() -> None:
    window = Window()
    window.note_status(0.0, status())
    window.note_request(facts(1, 1.0))
    assert explained(window).what_if.why_not == "1 requests in the window; 20 are the least to replay"
