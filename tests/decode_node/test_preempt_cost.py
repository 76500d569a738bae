"""Parking or computing again: by measured rates that fade."""

from __future__ import annotations

import pytest

from penstock.decode_node.preempt_cost import FADE, STALE_S, PreemptCost, Rate

MB = 1 << 20


def test_rate_is_unknown_until_it_is_measured() -> None:
    rate = Rate()
    assert rate.per_s(0.0) is None
    rate.note(100, 0.5, now=1.0)
    assert rate.per_s(1.0) == 200.0


@pytest.mark.parametrize(("units", "seconds"), [(0, 1.0), (10, 0.0), (10, -0.1)])
def test_rate_sample_without_units_or_time_says_nothing(units: float, seconds: float) -> None:
    rate = Rate()
    rate.note(units, seconds, now=0.0)
    assert rate.per_s(0.0) is None
    rate.note(100, 1.0, now=0.0)
    rate.note(units, seconds, now=STALE_S)
    assert rate.per_s(STALE_S) == 100.0
    assert rate.per_s(STALE_S + 1.0) is None


def test_rate_weighs_long_samples_more_and_old_ones_less() -> None:
    rate = Rate()
    rate.note(1000, 1.0, now=0.0)
    rate.note(1, 0.1, now=1.0)
    assert rate.per_s(1.0) == pytest.approx((1000 * FADE + 1) / (FADE + 0.1))
    for _ in range(40):
        rate.note(50, 1.0, now=2.0)
    assert rate.per_s(2.0) == pytest.approx(50, rel=0.01)


def test_rate_forgets_what_is_too_old() -> None:
    rate = Rate()
    rate.note(1, 1000.0, now=0.0)
    assert rate.per_s(STALE_S + 0.1) is None
    rate.note(100, 1.0, now=STALE_S + 0.1)
    assert rate.per_s(STALE_S + 0.1) == 100.0


@pytest.mark.parametrize(
    ("num_mb", "num_tokens", "is_parked"), [(200, 100, True), (200, 99, False), (0.1, 1, True), (50, 0, False)]
)
def test_cheaper_way_is_chosen_by_both_rates(num_mb: float, num_tokens: int, is_parked: bool) -> None:
    cost = PreemptCost()
    cost.copying.note(1000 * MB, 1.0, now=0.0)  # 1000 MB/s: 200 MB take 0.2 s
    cost.prefill.note(500, 1.0, now=0.0)  # 500 tokens/s: 100 tokens take 0.2 s
    assert cost.prefers_parking(int(num_mb * MB), num_tokens, now=0.0) is is_parked


def test_unknown_rate_means_parking_so_that_it_gets_known() -> None:
    cost = PreemptCost()
    assert cost.prefers_parking(MB, 10, now=0.0)
    cost.prefill.note(1_000_000, 1.0, now=0.0)
    assert cost.prefers_parking(MB, 10, now=0.0)
    cost.copying.note(1, 1.0, now=0.0)
    assert not cost.prefers_parking(MB, 10, now=0.0)
    assert cost.prefers_parking(MB, 10, now=STALE_S + 1.0), "one slow copy must not decide for ever"


def test_rate_of_prefill_workers_serves_until_there_is_an_own_one() -> None:
    cost = PreemptCost()
    cost.copying.note(MB, 1.0, now=0.0)
    cost.prefill_elsewhere.note(100, 1.0, now=0.0)
    assert not cost.prefers_parking(2 * MB, 100, now=0.0)
    cost.prefill.note(10, 1.0, now=0.0)
    assert cost.prefers_parking(2 * MB, 100, now=0.0)
