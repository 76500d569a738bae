"""Canaries: a worker shows that it works before it counts as ready, and nobody hears of it."""

from __future__ import annotations

import pytest

from penstock.core.errors import Unavailable
from penstock.protocol.messages import (
    AttemptFailed,
    Heartbeat,
    Output,
    SampledToken,
    StartDecode,
    StartPrefill,
    Tokens,
    WorkerLoad,
)
from penstock.router.canary import PREFIX, TIMEOUT_S


@pytest.fixture
def rig(make_rig):
    return make_rig(canary=True, breaker_failures=1, worker_timeout_s=1000.0, unacknowledged_s=1000.0)


def canaries(rig, worker, kind=StartDecode):
    return [
        send.message.body
        for send in rig.sent[worker]
        if isinstance(send.message.body, kind) and send.message.body.request_id.startswith(PREFIX)
    ]


def sing(rig, worker):
    """The last canary of this decode worker gives its token."""
    start = canaries(rig, worker)[-1]
    item = Tokens(start.request_id, start.attempt, 0, 0, (SampledToken(7),), "length")
    return rig.say(worker, Output([item]))


def fail(rig, worker, code="internal_error"):
    start = canaries(rig, worker)[-1]
    return rig.say(worker, AttemptFailed(start.request_id, start.attempt, code, "no disk", code != "bad_request"))


def row(rig, name):
    return next(row for row in rig.core.status().workers if row.worker_id == name)


def test_decode_worker_is_ready_once_it_has_given_a_token(rig):
    worker = rig.join("d0")
    (start,) = canaries(rig, worker)
    assert start.ticket is None
    assert rig.core.status().why_not_ready == "no decode worker is ready; worker d0 has given no token yet"
    effects = sing(rig, worker)
    assert effects == [], "nobody hears of it"
    status = rig.core.status()
    assert (status.ready, status.active_requests, row(rig, "d0").canary) == (True, 0, "")
    rig.beat(worker)
    assert len(canaries(rig, worker)) == 1


def test_prefill_worker_is_proven_by_a_hand_off(rig):
    prefill, decode = rig.pair()
    (asked,) = canaries(rig, prefill, StartPrefill)
    (start,) = canaries(rig, decode)
    assert (asked.decode_worker, asked.ticket) == ("d0", start.ticket)
    assert row(rig, "p0").canary == row(rig, "d0").canary == "has given no token yet"
    sing(rig, decode)
    assert row(rig, "p0").canary == row(rig, "d0").canary == ""
    assert rig.core.status().ready


def test_nothing_is_counted_or_learnt(rig):
    prefill, decode = rig.pair()
    before = rig.core._life.placer.model.expected_output_tokens
    sing(rig, decode)
    rig.beat(prefill)
    counters = rig.core.counters
    assert (counters.accepted, counters.ended, counters.attempts, counters.remote_prefills) == (0, 0, 0, 0)
    assert rig.core._life.placer.model.expected_output_tokens == before
    assert len(rig.core._life.placer.index) == 0
    assert rig.core._life.offered.window(rig.clock.now())[1].num_requests == 0


def test_failed_canary_opens_the_breaker_and_says_why_and_is_tried_again(rig):
    worker = rig.join("d0")
    fail(rig, worker)
    assert "worker d0 canary failed:" in rig.core.status().why_not_ready
    assert "no disk" in rig.core.status().why_not_ready
    assert row(rig, "d0").breakers == {"decode": 1.0}
    assert rig.core.counters.retries == 0
    rig.wait(0.5)
    rig.beat(worker)
    assert len(canaries(rig, worker)) == 1, "not at once"
    rig.wait(0.5)
    assert len(canaries(rig, worker)) == 2
    sing(rig, worker)
    assert rig.core.status().ready
    assert row(rig, "d0").breakers == {}


def test_one_that_is_never_answered_fails_after_its_time(rig):
    worker = rig.join("d0")
    rig.stay(TIMEOUT_S, worker)
    assert "timeout_s 10 passed" in row(rig, "d0").canary


def test_canary_that_is_late_beside_other_work_says_nothing_against_the_worker(make_rig):
    rig = make_rig(canary=True, worker_timeout_s=1000.0, unacknowledged_s=1000.0)
    prefill, decode = rig.join("p0", "prefill"), rig.join("d0")
    sing(rig, decode)
    rig.submit("r")
    rig.out(1, request_id="r")
    other = rig.join("p1", "prefill")
    rig.beat(decode, links=[prefill, other])
    rig.beat(other)
    assert canaries(rig, other, StartPrefill)
    rig.stay(TIMEOUT_S, prefill, decode, other)
    assert row(rig, "d0").canary == ""
    assert "timeout_s 10 passed" in row(rig, "p1").canary


def test_router_that_stops_blames_nobody(rig, caplog):
    rig.join("d0")
    rig.do(rig.core.end_all(Unavailable("the router is stopping")))
    assert row(rig, "d0").canary == "has given no token yet"
    assert not caplog.records


def test_worker_that_refuses_the_prompt_itself_has_answered(rig):
    worker = rig.join("d0")
    fail(rig, worker, "bad_request")
    assert rig.core.status().ready


def test_unproven_worker_gets_requests_only_where_nobody_else_can(rig):
    first = rig.join("d0")
    sing(rig, first)
    rig.join("d1")
    for number in range(4):
        rig.submit(f"r{number}")
        assert rig.start(f"r{number}")[0] == first


def test_request_does_not_wait_for_the_canary_and_proves_as_much(rig):
    worker = rig.join("d0")
    rig.submit("r")
    assert rig.start("r")[0] == worker
    rig.out(1, request_id="r")
    assert rig.core.status().ready


def test_idle_worker_is_asked_again_and_a_busy_one_is_not(make_rig):
    rig = make_rig(canary=True, canary_idle_s=5.0, worker_timeout_s=1000.0, unacknowledged_s=1000.0)
    worker = rig.join("d0")
    sing(rig, worker)
    rig.submit("r")
    rig.out(1, request_id="r")
    rig.stay(6.0, worker)
    assert len(canaries(rig, worker)) == 1
    rig.out(3, request_id="r", end="length")
    rig.stay(6.0, worker)
    assert len(canaries(rig, worker)) == 2
    fail(rig, worker)
    assert not rig.core.status().ready


def test_lost_worker_takes_its_canary_along_and_nothing_stays(rig):
    _, decode = rig.pair()
    rig.goodbye(decode)
    assert rig.core._life.num_canaries == 0
    assert row(rig, "p0").canary == "has given no token yet", "the other one is to blame"
    assert decode not in [key for key, _ in rig.core._life.placer.evidence._shown]


def test_worker_with_another_role_shows_it_anew(rig):
    worker = rig.join("d0")
    sing(rig, worker)
    rig.hello(worker)
    assert row(rig, "d0").canary == ""
    other = rig.join("d1")
    sing(rig, other)
    number = rig.sent[worker][-1].message.number
    rig.say(worker, Heartbeat(number, "ready", WorkerLoad(100, 100), [], [], role="prefill"))
    assert row(rig, "d0").canary == "has given no token yet"


def test_it_is_off_in_the_core_unless_asked_for(make_rig):
    rig = make_rig()
    worker = rig.join("d0")
    assert canaries(rig, worker) == []
    assert rig.core.status().ready
