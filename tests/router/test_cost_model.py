from __future__ import annotations

import math
import random

import pytest

from penstock.core.ids import AttemptKey, WorkerKey
from penstock.router.answer_lengths import AnswerLengths
from penstock.router.cost_model import MAX_FACTORS, CostModel, Factors
from penstock.router.prompt_queue import PromptQueue
from penstock.router.regression import Regression

TRUTH = (0.02, 2e-4, 3e-9)
A, B = WorkerKey("a", "0" * 16), WorkerKey("b", "1" * 16)


def causes(rng: random.Random) -> tuple[float, float, float]:
    tokens, before = rng.randint(16, 20_000), rng.choice([0, 0, rng.randint(0, 50_000)])
    return 1.0, float(tokens), tokens * (before + tokens / 2)


def seconds(x: tuple[float, ...], truth: tuple[float, ...] = TRUTH) -> float:
    return sum(c * v for c, v in zip(truth, x, strict=True))


def feed(line: Regression, rng: random.Random, count: int, truth=TRUTH, noise=0.03) -> None:
    for _ in range(count):
        x = causes(rng)
        line.observe(x, seconds(x, truth) * rng.gauss(1, noise))


def worst_error(line: Regression, truth=TRUTH) -> float:
    rng = random.Random(99)
    errors = []
    for _ in range(50):
        x = causes(rng)
        errors.append(abs(line.predict(x) / seconds(x, truth) - 1))
    return max(errors)


@pytest.mark.parametrize("factor", [0.05, 1.0, 30.0])
def test_line_converges_from_a_prior_that_is_far_off(factor: float) -> None:
    line = Regression([c * factor for c in TRUTH], trust=10)
    feed(line, random.Random(1), 300)
    assert worst_error(line) < 0.08


def test_line_forgets_what_no_longer_holds() -> None:
    line, rng = Regression(TRUTH, trust=10), random.Random(2)
    feed(line, rng, 1000)
    slower = tuple(3 * c for c in TRUTH)
    assert worst_error(line, slower) > 0.5
    feed(line, rng, 1000, slower)
    assert worst_error(line, slower) < 0.1


def test_single_hiccups_hardly_move_the_line() -> None:
    line, rng = Regression(TRUTH, trust=10), random.Random(3)
    feed(line, rng, 500)
    for _ in range(200):
        x = causes(rng)
        line.observe(x, seconds(x) * (100.0 if rng.random() < 0.05 else rng.gauss(1, 0.03)))
    assert worst_error(line) < 0.35


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1.0, -math.inf])
def test_what_cannot_be_a_duration_changes_nothing(garbage: float) -> None:
    line = Regression(TRUTH)
    assert not line.observe((1.0, 10.0, 50.0), garbage)
    assert not line.observe((1.0, garbage, 50.0), 0.1)
    assert (line.coefficients, line.num_refused, line.num_observed) == (list(TRUTH), 2, 0)


def test_coefficients_stay_finite_and_never_fall_below_zero() -> None:
    line, rng = Regression(TRUTH, trust=10), random.Random(4)
    for _ in range(5000):
        line.observe((1.0, rng.choice([0.0, 1e6]), rng.choice([0.0, 1e12])), rng.choice([0.0, 1e-9, 1e6]))
        assert all(math.isfinite(c) and c >= 0 for c in line.coefficients)


def test_line_that_sees_one_size_only_stays_right_there() -> None:
    line = Regression(TRUTH, trust=10)
    x = (1.0, 512.0, 512 * 256.0)
    for _ in range(20_000):
        line.observe(x, 0.5)
    assert line.predict(x) == pytest.approx(0.5, rel=0.01)


def test_same_observations_give_the_same_predictions() -> None:
    lines = [Regression(TRUTH), Regression(TRUTH)]
    for line in lines:
        feed(line, random.Random(5), 200)
    assert lines[0].coefficients == lines[1].coefficients


def test_before_anything_is_seen_staying_costs_less_than_a_hand_off() -> None:
    model = CostModel()
    for tokens in (1, 100, 10_000, 100_000):
        assert model.prefill_s(A, tokens, 0) < model.prefill_s(A, tokens, 0) + model.transfer_s(A, B, tokens * 1000)


def test_model_tells_a_slow_worker_and_a_slow_pair_from_the_others() -> None:
    model, rng = CostModel(), random.Random(6)
    for _ in range(600):
        tokens = rng.randint(100, 4000)
        model.saw_prefill(A, tokens, 0, 0, 0.01 + tokens * 1e-4)
        model.saw_prefill(B, tokens, 0, 0, 2 * (0.01 + tokens * 1e-4))
        model.saw_transfer(A, B, tokens * 1000, 0.001 + tokens * 1e-6)
        model.saw_transfer(B, A, tokens * 1000, 4 * (0.001 + tokens * 1e-6))
    assert model.prefill_s(A, 2000, 0) == pytest.approx(0.21, rel=0.15)
    assert model.prefill_s(B, 2000, 0) == pytest.approx(0.42, rel=0.15)
    assert model.transfer_s(B, A, 2_000_000) > 2.5 * model.transfer_s(A, B, 2_000_000)


def test_model_learns_the_pace_of_streams_and_what_prompts_beside_them_cost() -> None:
    model, rng = CostModel(), random.Random(7)
    for _ in range(1500):
        streams, held = rng.randint(1, 40), rng.randint(100, 100_000)
        busy = rng.choice([0.0, 0.0, rng.random() * 0.1])
        model.saw_tokens(streams, held, busy, 0.02 + 3e-4 * streams + 1e-7 * held + 0.8 * busy)
    assert model.token_s(20, 50_000) == pytest.approx(0.031, rel=0.05)
    assert model.stall == pytest.approx(0.8, rel=0.1)
    assert model.slowdown_s(1000) == pytest.approx(4e-4, rel=0.1)


def test_factors_are_bounded_in_number_and_in_size() -> None:
    factors: Factors[int] = Factors()
    for _ in range(200):
        factors.learn(-1, 1.0, 1e9)
    assert 4.9 < factors.get(-1) <= 5.0
    for worker in range(MAX_FACTORS):
        factors.learn(worker, 1.0, 1.0)
    assert factors.get(-1) == 1.0
    factors.learn(5, 0.0, 1.0)
    factors.learn(5, 1.0, math.nan)
    assert factors.get(5) == 1.0


def test_share_of_short_answers_follows_what_is_seen_and_fades() -> None:
    lengths = AnswerLengths()
    for _ in range(2000):
        lengths.add(100)
    assert lengths.share_below(64) < 0.01
    assert lengths.share_below(96) == pytest.approx(0.5, abs=0.02)
    assert lengths.share_below(1e9) == 1.0
    for _ in range(2000):
        lengths.add(4)
    assert lengths.share_below(64) > 0.95
    assert (lengths.share_below(0), lengths.share_below(1)) == (0.0, 0.0)


def test_prompt_queue_by_hand() -> None:
    queue, first, second = PromptQueue(), AttemptKey("a", 1), AttemptKey("b", 1)
    assert queue.wait_s(5.0) == 0
    queue.add(first, 2.0, now=10.0)
    queue.add(second, 3.0, now=11.0)
    assert queue.wait_s(11.5) == pytest.approx(0.5 + 3.0)
    assert queue.wait_s(20.0) == pytest.approx(3.0)  # the first overruns: it is expected to end at once
    queue.remove(first, now=13.0)
    assert queue.wait_s(14.0) == pytest.approx(2.0)
    queue.remove(second, now=16.0)
    queue.remove(second, now=17.0)
    assert (queue.wait_s(18.0), len(queue)) == (0.0, 0)
    assert queue.busy_s(99.0) == pytest.approx(6.0)
    queue.add(first, 1.0, now=100.0)
    assert queue.busy_s(100.5) == pytest.approx(6.5)


def test_neighbours_are_told_apart_from_what_a_worker_does_to_itself() -> None:
    model, rng = CostModel(), random.Random(8)
    for _ in range(800):
        new, beside = rng.randint(50, 3000), rng.randint(0, 1)
        model.saw_prefill(A, new, 0, 0, new * 1e-4 * (1 + beside), beside)
        streams, own, other = rng.randint(1, 9), rng.random() / 50, rng.random() / 50
        model.saw_tokens(streams, 300.0 * streams, own, 0.01 + 1e-4 * streams + 0.9 * own + 0.5 * other, other)
    assert model.prefill_s(A, 1000, 0, 0, 0) == pytest.approx(0.1, rel=0.1)
    assert model.prefill_s(A, 1000, 0, 0, 1) == pytest.approx(0.2, rel=0.1)
    assert model.neighbour_stall == pytest.approx(0.5, rel=0.15)
    assert model.stall == pytest.approx(0.9, rel=0.15)


def test_first_observations_of_a_worker_count_most_once_the_line_is_settled() -> None:
    settled: Factors[int] = Factors()
    settled.learn(1, 1.0, 3.0, is_settled=True)
    assert settled.get(1) == 2.0
    settled.learn(1, 1.0, 3.5, is_settled=True)
    assert settled.get(1) == pytest.approx(2.5)
    new: Factors[int] = Factors()
    new.learn(1, 1.0, 3.0)
    assert new.get(1) == pytest.approx(1.2)
