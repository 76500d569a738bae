"""The search finds a capacity that is known, and comparison finds differences larger than noise and no others."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from penstock.loadtest.comparison import Leg, Rounds, compare, order
from penstock.loadtest.search import Limits, Probe, RateSearch


def searched(search: RateSearch, probe: Callable[[float], Probe]) -> RateSearch:
    while (rate := search.next_rate()) is not None:
        search.add(probe(rate))
        assert len(search.probes) < 100
    return search


def cliff(capacity: float, valid_until: float = 1e9) -> Callable[[float], Probe]:
    """All requests are good up to the capacity, half of them above."""
    return lambda rate: Probe(rate, 1000 if rate <= capacity else 500, 1000, is_valid=rate <= valid_until)


@pytest.mark.parametrize("capacity", [0.07, 0.9, 1.0, 3.3, 17.0, 640.0])
@pytest.mark.parametrize("start", [0.5, 1.0, 20.0])
def test_capacity_is_found_within_the_precision(capacity: float, start: float) -> None:
    found = searched(RateSearch(0.9, Limits(start, precision=1.05, max_probes=40)), cliff(capacity))
    assert capacity / 1.05 <= found.best <= capacity
    assert not found.is_client_bound


def test_sloping_attainment_is_crossed_where_it_is_the_share() -> None:
    def probe(rate: float) -> Probe:
        return Probe(rate, round(10_000 * min(1.0, 1.2 - rate / 10)), 10_000)

    loose = searched(RateSearch(0.9, Limits(1.0, precision=1.02, max_probes=40)), probe)
    assert loose.best == pytest.approx(3.0, rel=0.03)
    strict = searched(RateSearch(0.99, Limits(1.0, precision=1.02, max_probes=40)), probe)
    assert strict.best == pytest.approx(2.1, rel=0.03)


def test_noisy_probes_end_near_the_capacity() -> None:
    draw = random.Random(7)

    def probe(rate: float) -> Probe:
        share = 0.98 if rate <= 5.0 else max(0.0, 0.98 - (rate - 5.0) / 2)
        return Probe(rate, sum(draw.random() < share for _ in range(300)), 300)

    found = searched(RateSearch(0.9, Limits(1.0, max_probes=30)), probe)
    assert 4.5 < found.best < 5.6


def test_answer_is_confirmed_by_a_second_probe() -> None:
    found = searched(RateSearch(0.9, Limits(1.0)), cliff(5.0))
    assert sum(probe.rate == found.best for probe in found.probes) == 2


def test_lucky_probe_is_taken_back_by_its_confirmation() -> None:
    asked: list[float] = []

    def probe(rate: float) -> Probe:
        asked.append(rate)
        is_lucky = rate == 4.0 and asked.count(4.0) == 1
        return Probe(rate, 100 if rate <= 3.0 or is_lucky else 50, 100)

    found = searched(RateSearch(0.9, Limits(1.0, max_probes=30)), probe)
    assert found.best <= 3.0
    assert found.best > 2.8


def test_saturated_probe_is_not_met_however_good_it_looks() -> None:
    found = searched(
        RateSearch(0.9, Limits(1.0, max_probes=30)), lambda rate: Probe(rate, 100, 100, is_saturated=rate > 2.5)
    )
    assert 2.3 < found.best <= 2.5


def test_client_that_gives_out_first_bounds_the_answer_and_is_named() -> None:
    found = searched(RateSearch(0.9, Limits(1.0, max_probes=30)), cliff(1e6, valid_until=6.0))
    assert 5.7 < found.best <= 6.0
    assert found.is_client_bound


def test_server_that_never_keeps_targets_has_no_rate() -> None:
    found = searched(RateSearch(0.9, Limits(1.0, lowest=0.1)), cliff(0.0))
    assert found.best == 0.0
    assert len(found.probes) < 6


def test_search_stops_at_the_highest_rate() -> None:
    assert searched(RateSearch(0.9, Limits(1.0, highest=50.0)), cliff(1e6)).best == 50.0


def test_number_of_probes_is_bounded() -> None:
    found = searched(RateSearch(0.9, Limits(1.0, max_probes=3)), cliff(100.0))
    assert len(found.probes) == 3
    assert found.best == 4.0


def test_looser_share_goes_on_from_the_stricter_ones_probes() -> None:
    strict = searched(RateSearch(0.99, Limits(1.0, max_probes=30)), cliff(5.0))
    loose = searched(RateSearch(0.9, Limits(1.0, max_probes=30), list(strict.probes)), cliff(5.0))
    assert loose.num_own == 0
    assert loose.best == strict.best


def test_rounds_turn_their_order_and_run_the_base_twice() -> None:
    first, second = order(2, 0), order(2, 1)
    assert first == [Leg(0), Leg(1), Leg(0, is_again=True)]
    assert second == [Leg(1), Leg(0, is_again=True), Leg(0)]
    assert sorted(map(str, first)) == sorted(map(str, second))


@pytest.mark.parametrize(
    ("other", "is_less_better", "verdict"),
    [
        ([1.5, 1.6, 1.55], True, "worse"),
        ([1.5, 1.6, 1.55], False, "better"),
        ([0.5, 0.6, 0.55], True, "better"),
        ([1.02, 0.99, 1.01], True, "within noise"),
        ([1.5, 1.0, 1.6], True, "within noise"),
    ],
)
def test_difference_counts_when_all_rounds_are_outside_the_noise(
    other: list[float], is_less_better: bool, verdict: str
) -> None:
    found = compare("x", 1, Rounds([1.0, 1.0, 1.0], [1.05, 0.98, 1.02], other), is_less_better)
    assert found is not None
    assert found.verdict == verdict
    assert (found.noise.low, found.noise.high) == (0.98, 1.05)


def test_same_server_is_within_noise_most_of_the_time() -> None:
    draw = random.Random(3)
    verdicts = []
    for _ in range(200):
        base, again, other = ([draw.lognormvariate(0, 0.05) for _ in range(3)] for _ in range(3))
        found = compare("x", 1, Rounds(base, again, other), True)
        assert found is not None
        verdicts.append(found.verdict)
    assert verdicts.count("within noise") > 180


def test_missing_figure_is_not_compared() -> None:
    assert compare("x", 1, Rounds([1.0], [1.0], [0.0]), True) is None
