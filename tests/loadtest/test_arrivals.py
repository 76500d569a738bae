"""Schedules have the rate and the burstiness they are named for, and are the same for the same seed."""

from __future__ import annotations

import statistics

import pytest

from penstock.loadtest.arrivals import Arrivals, replay, spread

N = 20_000


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in zip([0.0, *times], times, strict=False)]


@pytest.mark.parametrize(
    ("arrivals", "variation"),
    [
        (Arrivals("poisson", 5.0), 1.0),
        (Arrivals("gamma", 5.0, burstiness=1.0), 1.0),
        (Arrivals("gamma", 5.0, burstiness=0.25), 2.0),
        (Arrivals("gamma", 5.0, burstiness=4.0), 0.5),
    ],
)
def test_random_arrivals_have_their_rate_and_variation(arrivals: Arrivals, variation: float) -> None:
    found = gaps(arrivals.times(N, seed=3))
    assert statistics.mean(found) == pytest.approx(0.2, rel=0.05)
    assert statistics.pstdev(found) / statistics.mean(found) == pytest.approx(variation, rel=0.05)
    assert min(found) >= 0


def test_poisson_is_a_true_draw_and_not_rescaled() -> None:
    ends = {round(Arrivals("poisson", 10.0).times(100, seed)[-1], 6) for seed in range(5)}
    assert len(ends) == 5


def test_seed_decides_everything() -> None:
    one = Arrivals("poisson", 2.0)
    assert one.times(50, 1) == one.times(50, 1)
    assert one.times(50, 1) != one.times(50, 2)
    assert one.times(50, 1)[:20] == one.times(20, 1)


def test_constant_arrivals_are_even() -> None:
    assert Arrivals("constant", 4.0).times(4, 0) == [0.0, 0.25, 0.5, 0.75]


def test_burst_is_all_at_once() -> None:
    assert Arrivals("burst").times(3, 0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", ["linear-ramp", "exponential-ramp"])
def test_ramp_begins_and_ends_at_its_rates(shape: str) -> None:
    found = gaps(Arrivals(shape, 1.0, end_rate=100.0).times(N, seed=1))  # type: ignore[arg-type]
    assert statistics.mean(found[-200:]) == pytest.approx(1 / 100, rel=0.25)
    middle = 50.5 if shape == "linear-ramp" else 10.0
    assert statistics.mean(found[N // 2 - 200 : N // 2 + 200]) == pytest.approx(1 / middle, rel=0.2)
    assert statistics.mean(found[:20]) > 0.3


def test_replay_scales_time_and_starts_at_zero() -> None:
    assert replay([10.0, 12.0, 16.0], speed=2.0) == [0.0, 1.0, 3.0]


def test_spread_lays_equal_times_out_up_to_the_next() -> None:
    assert spread([0.0, 0.0, 0.0, 3.0, 6.0, 6.0]) == [0.0, 1.0, 2.0, 3.0, 6.0, 7.5]
    assert spread([5.0, 5.0]) == [5.0, 5.0]
