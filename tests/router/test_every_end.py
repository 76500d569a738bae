"""Every state of a request × everything that can happen to it: one end, right tokens, balanced books."""

from __future__ import annotations

import pytest

from penstock.core.errors import Unavailable
from penstock.protocol.messages import AttemptFailed, Output, PrefillEnded, SampledToken, Tokens


def waiting(rig):
    rig.submit(n=2)


def waiting_after_a_failure(rig):
    worker = rig.join("d0", "both")
    rig.submit(n=2)
    rig.failed(retriable=True)
    rig.out(1)
    rig.goodbye(worker)


def waiting_for_the_backoff(rig):
    rig.join("d0", "both")
    rig.submit(n=2)
    rig.failed(retriable=True)
    rig.failed(retriable=True)


def dispatched(rig):
    rig.pair()
    rig.submit(n=2)


def dispatched_and_acknowledged(rig):
    workers = rig.pair()
    rig.submit(n=2)
    for worker in workers:
        rig.beat(worker)


def dispatched_locally(rig):
    rig.join("d0", "both")
    rig.submit(n=2)


def handed_over(rig):
    rig.pair()
    rig.submit(n=2)
    rig.prefill_ended()


def running(rig):
    rig.pair()
    rig.submit(n=2)
    rig.out(1)


def running_with_prefill_over(rig):
    rig.pair()
    rig.submit(n=2)
    rig.prefill_ended()
    rig.out(1)
    rig.out(2, choice=1)


def running_with_one_choice_finished(rig):
    rig.pair()
    rig.submit(n=2)
    rig.out(2)
    rig.out(1, choice=1, end="stop")


def running_with_one_choice_cancelled(rig):
    rig.pair()
    rig.submit(n=2)
    rig.out(1)
    rig.cancel(choice=1)


def running_again(rig):
    rig.pair()
    rig.submit(n=2)
    rig.out(2)
    rig.failed(retriable=True)
    rig.out(1)


def started(rig):
    try:
        return rig.start()
    except ValueError:
        return None


def nothing(rig):
    pass


def cancel(rig):
    rig.cancel()


def cancel_choice(rig):
    rig.cancel(choice=0)


def cancel_all_choices(rig):
    rig.cancel(choice=0)
    rig.cancel(choice=1)


def deadline(rig):
    rig.wait(61)


def decode_silent(rig):
    for _ in range(7):
        rig.wait(0.25)
        rig.beat(rig.key("p0"), links=[])


def decode_exits(rig):
    rig.do(rig.core.worker_lost("d0", "killed"))


def decode_says_goodbye(rig):
    rig.goodbye(rig.key("d0"))


def prefill_exits(rig):
    rig.do(rig.core.worker_lost("p0", "killed"))


def prefill_silent(rig):
    for _ in range(7):
        rig.wait(0.25)
        rig.beat(rig.key("d0"))


def everything_silent(rig):
    rig.wait(2)


def attempt_failed_retriably(rig):
    if started(rig):
        rig.failed(retriable=True)


def attempt_failed_for_good(rig):
    if started(rig):
        rig.failed(retriable=False)


def attempt_ended_as_cancelled(rig):
    if started(rig):
        rig.failed(retriable=False, code="cancelled")


def prefill_failed(rig):
    begun = started(rig)
    if begun and begun[1].ticket is not None:
        rig.prefill_ended(ok=False, code="transfer_failed")


def both_sides_failed(rig):
    begun = started(rig)
    prefill_failed(rig)
    if begun:
        rig.say(begun[0], AttemptFailed("r", begun[1].attempt, "transfer_failed", "echo", True))


def decode_has_a_new_epoch(rig):
    rig.join("d0", "both", generation=1)


def prefill_has_a_new_epoch(rig):
    rig.join("p0", "prefill", generation=1)


def everything_twice(rig):
    """Each message so far again, and some from attempts and workers that never were."""
    begun = started(rig)
    if not begun:
        return
    worker, start = begun
    for choice, tokens in list(rig.tokens["r"].items()):
        packed = tuple(SampledToken(token) for token in tokens)
        rig.say(worker, Output([Tokens("r", start.attempt, choice, 0, packed)]))
        rig.say(worker, Output([Tokens("r", start.attempt + 1, choice, 0, packed)]))
        rig.say(worker, Output([Tokens("r", start.attempt - 1, choice, 9, packed)]))
        rig.say(rig.key("d0", 5), Output([Tokens("r", start.attempt, choice, 0, packed)]))
    rig.say(worker, PrefillEnded("r", start.attempt, False, "x", "x"))
    rig.say(rig.key("p0"), PrefillEnded("r", start.attempt + 1, False, "x", "x"))
    rig.say(rig.key("p0"), AttemptFailed("r", start.attempt, "x", "x"))


def gap(rig):
    begun = started(rig)
    if begun:
        rig.say(begun[0], Output([Tokens("r", begun[1].attempt, 0, 4, (SampledToken(1),))]))


def worker_forgot(rig):
    begun = started(rig)
    if begun:
        rig.beat(begun[0], active=[])


def command_got_lost(rig):
    for _ in range(10):
        rig.wait(0.25)
        for name in ("p0", "d0"):
            rig.beat(rig.key(name), received=2, active=[])


def drain(rig):
    rig.do(rig.core.drain())


def stop(rig):
    rig.do(rig.core.end_all(Unavailable("stopping")))


STATES = [
    waiting,
    waiting_after_a_failure,
    waiting_for_the_backoff,
    dispatched,
    dispatched_and_acknowledged,
    dispatched_locally,
    handed_over,
    running,
    running_with_prefill_over,
    running_with_one_choice_finished,
    running_with_one_choice_cancelled,
    running_again,
]
EVENTS = {
    nothing: None,
    cancel: None,
    cancel_choice: None,
    cancel_all_choices: None,
    deadline: "deadline_exceeded",
    decode_silent: None,
    decode_exits: None,
    decode_says_goodbye: None,
    prefill_exits: None,
    prefill_silent: None,
    everything_silent: None,
    attempt_failed_retriably: None,
    attempt_failed_for_good: "transfer_failed",
    attempt_ended_as_cancelled: None,  # only the caller cancels a request
    prefill_failed: None,
    both_sides_failed: None,
    decode_has_a_new_epoch: None,
    prefill_has_a_new_epoch: None,
    everything_twice: None,
    gap: None,
    worker_forgot: None,
    command_got_lost: None,
    drain: None,
    stop: "unavailable",
}


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_every_state_and_event_end_exactly_once(rig, state, event):
    state(rig)
    has_attempt = rig.core._life.table.active["r"].attempt is not None
    event(rig)
    rig.finish("r", rig.join("d8", "both"), rig.join("d9", "both"))
    expected = EVENTS[event]
    if event is attempt_failed_for_good and not has_attempt:
        expected = None  # a late word about an attempt that is over
    error = rig.ends["r"].error
    assert (error.code if error else None) == expected
    rig.stay(3, rig.key("d8"), rig.key("d9"))
    status = rig.core.status()
    assert (status.active_requests, status.queued_requests) == (0, 0)
    assert all(not worker.attempts and not worker.used_blocks for worker in rig.core._registry.all())
    assert rig.core.counters.accepted == rig.core.counters.ended == 1


@pytest.mark.parametrize("first", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("second", EVENTS, ids=lambda event: event.__name__)
def test_every_pair_of_events_ends_exactly_once(rig, first, second):
    running(rig)
    first(rig)
    second(rig)
    rig.finish("r", rig.join("d8", "both"), rig.join("d9", "both"))
    assert rig.core.counters.accepted == rig.core.counters.ended == 1
