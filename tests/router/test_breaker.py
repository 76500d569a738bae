"""Breakers open on failures in a row that the worker is to blame for, and let one attempt at a time find out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.core.errors import (
    BadRequest,
    Cancelled,
    ChecksumMismatch,
    DeadlineExceeded,
    InternalError,
    NodeLost,
    Overloaded,
    ServeError,
    TransferFailed,
)
from penstock.core.ids import WorkerKey
from penstock.router.breaker import LONGEST_PAUSE_S, Breakers
from penstock.router.retry_budget import RetryBudget

from .conftest import Rig

A, B = WorkerKey("a", "1"), WorkerKey("b", "1")
BROKEN = InternalError("the step failed")


def opened(count: int = 3) -> Breakers:
    breakers = Breakers(count, 1.0)
    for _ in range(count):
        breakers.note_failure(A, "decode", BROKEN, 10.0)
    return breakers


def test_it_opens_at_so_many_failures_in_a_row_and_says_so_once() -> None:
    breakers = Breakers(3, 1.0)
    assert [breakers.note_failure(A, "decode", BROKEN, 10.0) for _ in range(4)] == [False, False, True, False]
    assert breakers.is_open(A, "decode")
    assert not breakers.allows(A, "decode", 10.5)


def test_a_success_between_failures_starts_the_count_anew() -> None:
    breakers = Breakers(3, 1.0)
    for _ in range(5):
        breakers.note_failure(A, "decode", BROKEN, 10.0)
        breakers.note_failure(A, "decode", BROKEN, 10.0)
        breakers.note_success(A, "decode")
    assert breakers.allows(A, "decode", 10.0)


def test_legs_and_workers_are_apart() -> None:
    breakers = opened()
    assert breakers.allows(A, "prefill", 10.0)
    assert breakers.allows(B, "decode", 10.0)


@pytest.mark.parametrize(
    "error", [BadRequest("x"), Cancelled("x"), DeadlineExceeded("x"), NodeLost("x"), Overloaded("x")]
)
def test_what_no_worker_is_to_blame_for_never_opens_it(error: ServeError) -> None:
    breakers = Breakers(2, 1.0)
    assert not any(breakers.note_failure(A, "prefill", error, 10.0) for _ in range(50))
    assert breakers.allows(A, "prefill", 10.0)


@pytest.mark.parametrize("error", [BROKEN, TransferFailed("x"), ChecksumMismatch("x")])
def test_what_a_worker_does_wrong_opens_it(error: ServeError) -> None:
    breakers = Breakers(2, 1.0)
    assert [breakers.note_failure(A, "prefill", error, 10.0) for _ in range(2)] == [False, True]


def test_after_the_pause_one_attempt_is_on_trial() -> None:
    breakers = opened()
    assert breakers.allows(A, "decode", 11.0)
    breakers.note_attempt(A, "decode", 11.0)
    assert not breakers.allows(A, "decode", 11.5)
    breakers.note_success(A, "decode")
    assert breakers.allows(A, "decode", 11.5)
    assert not breakers.is_open(A, "decode")


def test_a_trial_that_fails_doubles_the_pause_up_to_a_bound() -> None:
    breakers, now = opened(), 11.0
    pauses = []
    for _ in range(8):
        breakers.note_attempt(A, "decode", now)
        breakers.note_failure(A, "decode", BROKEN, now)
        later = next(n for n in range(1, 1000) if breakers.allows(A, "decode", now + n / 4)) / 4
        pauses.append(later)
        now += later
    assert pauses[:4] == [2.0, 4.0, 8.0, 16.0]
    assert pauses[-1] == LONGEST_PAUSE_S


def test_a_trial_whose_outcome_is_never_told_does_not_close_the_worker_for_ever() -> None:
    breakers = opened()
    breakers.note_attempt(A, "decode", 11.0)
    assert breakers.allows(A, "decode", 12.0)


def test_another_incarnation_starts_with_a_clean_slate() -> None:
    breakers = opened()
    assert breakers.allows(WorkerKey("a", "2"), "decode", 10.0)
    breakers.forget(A)
    assert breakers.allows(A, "decode", 10.0)


def test_retries_are_free_until_the_budget_is_spent_then_they_queue_up() -> None:
    budget = RetryBudget(0.0, share=0.5, per_s=2.0, capacity=3.0)
    assert [budget.take(0.0) for _ in range(6)] == [0.0, 0.0, 0.0, 0.5, 1.0, 1.5]
    assert budget.take(2.0) == 0.0  # 4 more by then
    for _ in range(4):
        budget.note_request()
    assert [budget.take(2.0) for _ in range(3)] == [0.0, 0.0, 0.5]


def test_the_budget_saves_up_no_more_than_its_capacity() -> None:
    budget = RetryBudget(0.0, capacity=2.0)
    for _ in range(1000):
        budget.note_request()
    assert budget.take(1e6) == budget.take(1e6) == 0.0
    assert budget.take(1e6) > 0


def test_a_worker_that_fails_whatever_it_is_given_is_left_alone_and_tried_again(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(policy="round-robin", breaker_failures=3, breaker_pause_s=5.0)
    bad, good = rig.join("d0"), rig.join("d1")
    asked: list[str] = []

    def one(name: str, *, works: bool) -> None:
        rig.submit(name)
        worker, _ = rig.start(name)
        asked.append(worker.worker_id)
        if worker == bad and not works:
            rig.failed(retriable=True, request_id=name, code="internal_error")
        rig.finish(name, bad, good)
        assert rig.ends[name].error is None

    for number in range(20):
        one(f"r{number}", works=False)
    assert asked.count("d0") == 3
    assert asked[-10:] == ["d1"] * 10
    assert rig.core.counters.breakers_opened == 1
    rig.stay(10.0, bad, good)
    for number in range(20, 30):
        one(f"r{number}", works=True)
    assert asked[-10:].count("d0") >= 4


def test_bad_requests_leave_no_worker_alone(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(policy="round-robin", breaker_failures=2)
    rig.join("d0")
    for number in range(10):
        rig.submit(f"r{number}")
        rig.failed(retriable=False, request_id=f"r{number}", code="bad_request")
    assert rig.core.counters.breakers_opened == 0
    rig.submit("last")
    assert rig.start("last")[0] == rig.key("d0")


def test_prompts_stay_with_decode_while_prefill_fails(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(policy="least-loaded", breaker_failures=2, breaker_pause_s=5.0)
    prefill, decode = rig.pair()
    rig.submit()
    for _ in range(2):
        assert rig.start()[1].ticket is not None
        rig.prefill_ended(ok=False, code="internal_error")
    rig.wait(0.25)
    assert rig.start()[1].ticket is None
    rig.finish("r", prefill, decode)
    before = rig.bodies(prefill).count("StartPrefill")
    rig.submit("local")
    assert rig.bodies(prefill).count("StartPrefill") == before
    rig.finish("local", prefill, decode)
    rig.stay(12.0, prefill, decode)
    rig.submit("trial")
    assert rig.bodies(prefill).count("StartPrefill") == before + 1


def test_open_legs_tell_how_long_they_stay_so() -> None:
    breakers = opened()
    assert breakers.open_legs(A, 10.25) == {"decode": 0.75}
    assert breakers.open_legs(A, 20.0) == {"decode": 0.0}, "it is for the next attempt to find out"
    assert breakers.open_legs(B, 10.0) == {}
    breakers.note_success(A, "decode")
    assert breakers.open_legs(A, 10.25) == {}


def test_status_names_the_leg_that_is_left_alone(make_rig: type[Rig]) -> None:
    rig = make_rig(breaker_failures=1, breaker_pause_s=2.0, max_attempts=1, worker_timeout_s=9.0)
    rig.join("d0")
    rig.submit()
    rig.failed(code="internal_error", retriable=True)
    assert [row.breakers for row in rig.core.status().workers] == [{"decode": 2.0}]
    rig.wait(1.5)
    assert [row.breakers for row in rig.core.status().workers] == [{"decode": 0.5}]
