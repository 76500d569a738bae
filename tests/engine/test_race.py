"""The race against a plain twin, its distribution, and why it is one: what a draw by the cumulative sum does."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from penstock.core.random_bits import philox4x32, uniform
from penstock.engine.race import arrival_times, race_key, winner

VOCAB = 49_152


def plain_time(key: tuple[int, int, int, int], token_id: int) -> float:
    """The time of one token in whole numbers and float64."""
    word = token_id * 0x9E3779B1 % 2**32
    for multipliers, (before, between) in zip(
        ((0x85EBCA6B, 0xC2B2AE35), (0x7FEB352D, 0x846CA68B)), (key[:2], key[2:]), strict=True
    ):
        word ^= before
        word ^= word >> 16
        word = word * multipliers[0] % 2**32
        word ^= word >> 15
        word = (word + between) % 2**32
        word = word * multipliers[1] % 2**32
        word ^= word >> 16
    return -math.log1p(-min((word + 0.5) / 2**32, 1 - 2**-24))


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return np.exp(logits - logits.max()).astype(np.float32)


def test_times_are_those_of_the_plain_twin() -> None:
    key = race_key(5, 7)
    ids = np.array([0, 1, 2, 500, 8191, VOCAB - 1])
    expected = [plain_time(key, int(i)) for i in ids]
    assert arrival_times(key, VOCAB)[ids] == pytest.approx(expected, rel=1e-5)
    assert arrival_times(key, VOCAB, ids) == pytest.approx(expected, rel=1e-5)


def test_times_are_exponential_and_differ_with_seed_and_index() -> None:
    times = [arrival_times(race_key(seed, index), VOCAB) for seed, index in ((1, 0), (1, 1), (2, 0))]
    for one in times:
        assert float(one.mean()) == pytest.approx(1.0, abs=0.02)
        assert float(one.var()) == pytest.approx(1.0, abs=0.05)
        assert float((one < 0.001).mean()) == pytest.approx(0.001, abs=0.0006)
        assert np.isfinite(one).all()
        assert (one > 0).all()
    correlations = np.asarray(np.corrcoef(times))
    assert abs(correlations[np.triu_indices(3, 1)]).max() < 0.02


def test_key_is_not_the_draw_that_other_things_use() -> None:
    assert race_key(9, 4) != philox4x32((4, 0, 0, 0), (9, 0))


def test_frequencies_follow_the_weights_also_of_unlikely_tokens() -> None:
    weights = np.array([0.5, 0.3, 0.19, 0.009, 0.001], np.float32)
    counts = np.bincount([winner(weights, race_key(seed, 0)) for seed in range(60_000)], minlength=5)
    assert counts / 60_000 == pytest.approx(weights, abs=0.006)
    assert counts[4] == pytest.approx(60, abs=30)


def test_a_few_kept_tokens_race_as_in_the_whole_row() -> None:
    rng = np.random.default_rng(3)
    for seed in range(200):
        weights = np.zeros(2000, np.float32)
        kept = rng.choice(2000, 30, replace=False)
        weights[kept] = rng.random(30, np.float32)
        speeds = weights / arrival_times(race_key(seed, 1), 2000)
        assert winner(weights, race_key(seed, 1)) == int(speeds.argmax())


def test_only_token_with_weight_wins_whatever_its_time() -> None:
    for size in (1, 3, 900):
        weights = np.zeros(size, np.float32)
        weights[size // 2] = 1e-30
        assert {winner(weights, race_key(seed, 0)) for seed in range(50)} == {size // 2}


def by_cumulative_sum(weights: npt.NDArray[np.float32], seed: int) -> int:
    sums = weights.astype(np.float64).cumsum()
    return int((sums <= uniform(seed, 0) * sums[-1]).sum())


def test_draw_does_not_change_with_the_last_bits_of_the_logits() -> None:
    """As between two batch shapes, or two workers. The draw by the cumulative sum shows that the test can fail."""
    rng = np.random.default_rng(1)
    raced = summed = 0
    for seed in range(300):
        logits = rng.normal(0, 3, VOCAB)
        nearly = logits + rng.normal(0, 2e-5, VOCAB)
        raced += winner(softmax(logits), race_key(seed, 0)) != winner(softmax(nearly), race_key(seed, 0))
        summed += by_cumulative_sum(softmax(logits), seed) != by_cumulative_sum(softmax(nearly), seed)
    assert raced == 0
    assert summed > 0
