"""Figures of records written by hand, computed by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from penstock.loadtest.metrics import Targets, summarize, tokens_by_second
from penstock.loadtest.record import ErrorKind, Record, Use
from penstock.loadtest.statistics import distribution, percentile, slope_t, wilson
from penstock.loadtest.steady import Span, concurrency, is_saturated, steady_span

Make = Callable[..., Record]


def test_percentiles_lie_between_the_nearest_values() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    assert [percentile(values, p) for p in (0, 50, 90, 100)] == pytest.approx([1.0, 2.5, 3.7, 4.0])
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) == 0.0


def test_distribution_of_four_values() -> None:
    one = distribution([4.0, 1.0, 3.0, 2.0])
    assert (one.num, one.mean, one.least, one.greatest, one.median) == (4, 2.5, 1.0, 4.0, 2.5)
    assert one.std == pytest.approx(math.sqrt(1.25))
    assert distribution([]).num == 0


def test_wilson_interval_of_known_cases() -> None:
    assert wilson(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_slope_of_a_line_is_exact_and_of_noise_unclear() -> None:
    assert slope_t([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]) == (2.0, math.inf)
    draw = random.Random(1)
    _, t = slope_t([float(n) for n in range(200)], [draw.gauss(5, 1) for _ in range(200)])
    assert abs(t) < 3
    assert slope_t([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == (0.0, 0.0)


def test_latencies_count_from_the_intended_time(record: Make) -> None:
    one = record(intended_s=1.0, sent_s=1.5, times_s=(2.0, 2.1, 2.4), end_s=2.5)
    assert one.ttft_s == 1.0
    assert one.service_ttft_s == 0.5
    assert one.lag_s == 0.5
    assert one.tpot_s == pytest.approx(0.2)
    assert one.gaps_s == pytest.approx([0.1, 0.3])
    assert one.e2e_s == 1.5


def test_tpot_leaves_out_the_tokens_of_the_first_event(record: Make) -> None:
    one = record(times_s=(1.0, 2.0, 3.0), tokens=(4, 4, 2))
    assert one.tpot_s == pytest.approx(2.0 / 6)


def test_summary_of_three_requests(record: Make) -> None:
    records = [
        record(intended_s=0.0, times_s=(0.2, 0.4), end_s=0.5, number=0, use=Use(100, 2, 50, 3, 1)),
        record(intended_s=1.0, times_s=(1.4, 1.6), end_s=2.0, number=1, use=Use(100, 2, 30, 0, 0)),
        record(intended_s=2.0, times_s=(), end_s=4.0, failure=ErrorKind.REFUSED, number=2),
    ]
    found = summarize(records, Targets(ttft_s=0.3, tpot_s=0.5))
    assert found.latencies.ttft.mean == pytest.approx(0.3)
    assert found.latencies.ttft.num == 2
    assert (found.sent, found.throughput.completed, found.errors) == (3, 2, {"refused": 1})
    assert found.throughput.duration_s == 4.0
    assert found.throughput.requests_s == 0.5
    assert found.throughput.output_tok_s == 1.0
    assert found.throughput.total_tok_s == pytest.approx(51.0)
    assert found.offered_rate == 1.0
    assert found.goodput is not None
    assert (found.goodput.good, found.goodput.sent) == (1, 3)
    assert found.goodput.attainment == pytest.approx(1 / 3)
    assert found.goodput.requests_s == 0.25
    assert found.counts.cached_share == pytest.approx(0.4)
    assert found.counts.acceptance == pytest.approx(0.75)
    assert found.counts.num_short_answers == 2
    assert found.is_valid


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_request_that_failed_is_sent_and_not_good(kind: ErrorKind, record: Make) -> None:
    found = summarize([record(times_s=(0.1, 0.2), failure=kind)], Targets(ttft_s=1.0))
    assert found.goodput is not None
    assert (found.goodput.good, found.goodput.sent) == (0, 1)
    assert found.latencies.ttft.num == 0
    assert found.errors == {kind.value: 1}


@pytest.mark.parametrize(
    ("targets", "is_met"),
    [
        (Targets(ttft_s=1.0, tpot_s=0.5, e2e_s=2.0), True),
        (Targets(ttft_s=0.9), False),
        (Targets(tpot_s=0.4), False),
        (Targets(e2e_s=1.4), False),
        (Targets(ttft_s=1.0, e2e_s=1.4), False),
    ],
)
def test_good_request_keeps_every_target(targets: Targets, is_met: bool, record: Make) -> None:
    assert targets.is_met(record(times_s=(1.0, 1.5), end_s=1.5)) is is_met


def test_answer_of_one_token_keeps_any_tpot(record: Make) -> None:
    assert Targets(tpot_s=1e-9).is_met(record(times_s=(1.0,)))


def test_no_targets_no_goodput(record: Make) -> None:
    assert summarize([record()], Targets()).goodput is None


def test_no_requests_are_a_summary_too() -> None:
    found = summarize([], Targets(ttft_s=1.0))
    assert found.sent == 0
    assert found.throughput.requests_s == 0.0


@pytest.mark.parametrize(
    ("lags_s", "loop_lags_s", "ttft_s", "is_valid"),
    [
        ([0.0] * 99 + [0.009], [], None, True),
        ([0.0] * 50 + [0.02] * 50, [], None, False),
        ([0.0] * 50 + [0.02] * 50, [], 1.0, True),  # 5 % of the target are 50 ms
        ([0.0] * 50 + [0.06] * 50, [], 1.0, False),
        ([0.0] * 100, [0.05] * 100, None, False),
        ([0.0] * 100, [0.0] * 995 + [0.5] * 5, None, True),
    ],
)
def test_late_client_makes_the_run_invalid(
    lags_s: list[float], loop_lags_s: list[float], ttft_s: float | None, is_valid: bool, record: Make
) -> None:
    records = [record(intended_s=1.0, sent_s=1.0 + lag, times_s=(2.0, 3.0)) for lag in lags_s]
    found = summarize(records, Targets(ttft_s=ttft_s), loop_lags_s)
    assert found.is_valid is is_valid
    assert bool(found.client.why_invalid()) is not is_valid


def test_bound_of_lateness_can_be_given(record: Make) -> None:
    late = [record(intended_s=1.0, sent_s=1.2, times_s=(2.0,))]
    assert summarize(late, Targets(), max_lag_s=0.5).is_valid
    assert not summarize(late, Targets()).is_valid


def test_concurrency_steps_at_intended_times_and_ends(record: Make) -> None:
    records = [record(intended_s=0.0, times_s=(1.0,), end_s=2.0), record(intended_s=1.0, times_s=(1.5,), end_s=2.0)]
    assert concurrency(records) == [(0.0, 1), (1.0, 2), (2.0, 0)]


def test_steady_span_leaves_out_filling_and_draining(record: Make) -> None:
    filling = [record(intended_s=float(n), times_s=(30.0,), end_s=30.0 + n) for n in range(10)]
    span = steady_span(filling)
    assert span == Span(7.0, 32.0)  # 8 of 10 are under way from 7 s on, and until the third ends
    assert steady_span([]) is None


def test_steady_figures_are_of_requests_intended_within(record: Make) -> None:
    filling = [record(intended_s=float(n), times_s=(n + 20.0, n + 21.0), end_s=n + 21.0) for n in range(10)]
    found = summarize(filling, Targets())
    assert found.steady is not None
    assert found.steady.ttft.num == 3
    assert found.latencies.ttft.num == 10


def test_tokens_fall_into_their_seconds(record: Make) -> None:
    one = record(times_s=(0.5, 1.5, 1.7), tokens=(2, 1, 3), end_s=2.0)
    unknown = record(times_s=(0.1, 1.1), tokens=(None, None), end_s=1.2, use=Use(1, 8))
    assert tokens_by_second([one]) == [2.0, 4.0, 0.0]
    assert tokens_by_second([unknown]) == [4.0, 4.0]


def queue(record: Make, arrival_s: float, service_s: float, count: int) -> list[Record]:
    """One server, first come first served."""
    draw, free_s, at_s, found = random.Random(1), 0.0, 0.0, []
    for number in range(count):
        at_s += draw.expovariate(1 / arrival_s)
        free_s = max(free_s, at_s) + service_s
        found.append(record(intended_s=at_s, times_s=(free_s,), end_s=free_s, number=number))
    return found


def test_overloaded_queue_is_saturated_and_a_quiet_one_is_not(record: Make) -> None:
    assert is_saturated(queue(record, arrival_s=1.0, service_s=1.5, count=200))
    assert not is_saturated(queue(record, arrival_s=1.0, service_s=0.5, count=200))
    assert not is_saturated(queue(record, arrival_s=1.0, service_s=1.5, count=10))


def test_phases_add_up_to_the_clients_ttft(record: Make) -> None:
    one = record(intended_s=0.0, sent_s=0.1, times_s=(0.5, 0.6))
    one.phases = {"gateway_ms": 20.0, "prefill_ms": 200.0, "other_ms": 80.0, "ttft_ms": 300.0, "attempts": 1.0}
    found = summarize([one], Targets()).phases
    parts = ("client", "network", "gateway", "prefill", "other")
    assert [found[name].mean for name in parts] == pytest.approx([0.1, 0.1, 0.02, 0.2, 0.08])
    assert sum(found[name].mean for name in parts) == pytest.approx(one.ttft_s)
