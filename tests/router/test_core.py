"""The router core, event by event: who gets which command, what the caller sees, what is ignored."""

from __future__ import annotations

import pytest

from penstock.core.errors import (
    BadRequest,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    NodeLost,
    Overloaded,
    ProtocolError,
    TransferFailed,
    Unavailable,
)
from penstock.protocol.messages import (
    AttemptFailed,
    Output,
    Peers,
    Phases,
    PrefillEnded,
    SampledToken,
    Tokens,
    Welcome,
    unpack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.router.config import RouterConfig
from penstock.router.interface import GenerateRequest


def test_hello_of_first_worker_is_welcomed_with_numbered_commands(rig):
    worker = rig.key("d0")
    rig.hello(worker)
    bodies = [send.message.body for send in rig.sent[worker]]
    assert bodies == [Welcome(), Peers([])]
    assert [send.message.number for send in rig.sent[worker]] == [1, 2]


def test_hello_of_second_worker_introduces_both(rig):
    prefill, decode = rig.pair()
    assert [peer.worker_id for peer in rig.sent[prefill][-1].message.body.peers] == ["d0"]
    assert [peer.kv_address for peer in rig.sent[decode][-1].message.body.peers] == [f"/kv/{prefill}"]


def test_hello_repeated_is_welcomed_again_and_disturbs_nobody(rig):
    prefill, decode = rig.pair()
    before = len(rig.sent[prefill])
    rig.hello(decode)
    assert rig.bodies(decode)[-2:] == ["Welcome", "Peers"]
    assert len(rig.sent[prefill]) == before


def test_hello_with_other_fingerprint_is_refused_with_the_field_named(rig):
    rig.join("d0")
    other = rig.key("d1")
    rig.hello(other, dtype="bfloat16")
    assert rig.sent[other] == []
    (row,) = [row for row in rig.core.status().workers if row.worker_id == "d1"]
    assert row.state.startswith("refused: dtype differs: 'bfloat16' here, 'float32' there")


def test_refused_worker_is_taken_when_the_others_are_gone(rig):
    first, other = rig.join("d0"), rig.key("d1")
    rig.hello(other, dtype="bfloat16")
    rig.goodbye(first)
    rig.hello(other, dtype="bfloat16")
    assert "Welcome" in rig.bodies(other)


def test_hello_of_a_replaced_epoch_is_stale(rig):
    old, new = rig.join("d0"), rig.join("d0", generation=1)
    rig.hello(old)
    assert rig.core.counters.stale_messages == 1
    assert {row.epoch: row.restarts for row in rig.core.status().workers} == {new.epoch: 1}


def test_silent_worker_that_speaks_again_is_taken_back_and_serves(rig):
    decode = rig.join("d0")
    rig.wait(1.6)
    assert rig.core.status().workers[0].state == "lost"
    rig.beat(decode)
    assert rig.core.status().workers[0].state == "ready"
    rig.submit()
    assert rig.start()[0] == decode


def test_worker_whose_process_ended_is_never_taken_back(rig):
    decode = rig.join("d0")
    rig.do(rig.core.worker_lost("d0", "exit 1"))
    rig.beat(decode)
    rig.hello(decode)
    assert rig.core.status().workers[0].state == "lost"
    assert rig.core.counters.stale_messages == 2


def test_worker_lost_with_the_pid_of_a_predecessor_changes_nothing(rig):
    rig.join("d0")
    rig.do(rig.core.worker_lost("d0", "exit 1", pid=99))
    assert rig.core.status().ready
    rig.do(rig.core.worker_lost("d0", "exit 1", pid=100))
    assert not rig.core.status().ready


def test_heartbeat_of_a_stranger_from_an_earlier_router_is_answered_with_our_epoch(rig):
    stranger = rig.key("d7")
    rig.beat(stranger, received=5)
    (send,) = rig.sent[stranger]
    assert (send.message.number, send.message.body, send.message.router_epoch) == (0, Peers([]), rig.core.epoch)


def test_missing_link_makes_the_router_introduce_again(rig):
    prefill, decode = rig.pair()
    rig.links[decode] = []
    rig.stay(3.0, prefill, decode)
    assert rig.bodies(decode).count("Peers") >= 2


def test_submit_with_a_linked_pair_sends_both_commands_under_one_ticket(rig):
    prefill, decode = rig.pair()
    rig.submit(max_tokens=4)
    (holder, start), (source, feed) = rig.start(), rig.prefill()
    assert (holder, source) == (decode, prefill)
    assert start.ticket == feed.ticket
    assert (start.prefill_worker, start.prefill_epoch) == prefill
    assert (feed.decode_worker, feed.decode_epoch) == decode
    assert start.attempt == feed.attempt == 1
    assert unpack_ids(start.prompt_ids) == list(range(10))
    assert start.timeout_s == pytest.approx(60)


def test_tokens_are_delivered_and_the_request_ends_once(rig):
    rig.pair()
    rig.submit(max_tokens=4)
    rig.out(1)
    rig.prefill_ended()
    rig.out(2)
    rig.out(1, end="length")
    assert rig.tokens["r"][0] == [1000, 1001, 1002, 1003]
    assert rig.ends["r"].error is None
    assert rig.ends["r"].attempts == 1
    assert rig.core.counters.stale_messages == 0


def test_prefill_ended_after_a_short_answer_is_not_stale(rig):
    rig.pair()
    rig.submit(max_tokens=1)
    worker, feed = rig.prefill()
    rig.out(1, end="length")
    rig.say(worker, PrefillEnded("r", feed.attempt, True))
    assert rig.core.counters.stale_messages == 0
    assert rig.aborts(worker) == []


def test_finish_without_tokens_ends_the_choice(rig):
    rig.join("d0", "both")
    rig.submit()
    rig.out(0, end="stop")
    assert rig.finished["r"] == {0: "stop"}
    assert rig.ends["r"].error is None


def test_phases_are_delivered_once_for_a_request(rig):
    rig.join("d0", "both")
    rig.submit(n=2)
    worker, start = rig.start()
    for choice in (0, 1):
        token = (SampledToken(rig.token_at(choice, 0)),)
        rig.say(worker, Output([Tokens("r", start.attempt, choice, 0, token, phases=Phases(prefill_s=0.5))]))
    assert [event.phases is not None for event in rig.events["r"]] == [True, False]


@pytest.mark.parametrize(
    ("count", "index", "delivered", "duplicates"),
    [(2, 0, 2, 1), (1, 1, 2, 1), (3, 0, 3, 1), (2, 1, 3, 1), (1, 2, 3, 0), (0, 2, 2, 1)],
)
def test_overlapping_tokens_deliver_only_what_is_new(rig, count, index, delivered, duplicates):
    rig.join("d0", "both")
    rig.submit(max_tokens=8)
    rig.out(2)
    rig.out(count, index=index)
    assert len(rig.tokens["r"][0]) == delivered
    assert rig.core.counters.duplicate_tokens == duplicates


@pytest.mark.parametrize(("count", "index"), [(1, 3), (7, 2)])
def test_gap_or_too_many_tokens_breaks_the_attempt_and_retries_behind_what_was_delivered(rig, count, index):
    decode = rig.join("d0", "both")
    rig.submit(max_tokens=8)
    rig.out(2)
    rig.out(count, index=index)
    assert [(abort.attempt, abort.choice) for abort in rig.aborts(decode)] == [(1, None)]
    start = rig.start()[1]
    assert start.attempt == 2
    assert unpack_ids(start.choices[0].output_ids) == [1000, 1001]
    rig.finish("r", decode)
    assert len(rig.tokens["r"][0]) == 8


def test_tokens_of_a_choice_that_does_not_exist_break_the_attempt(rig):
    worker = rig.join("d0", "both")
    rig.submit()
    rig.say(worker, Output([Tokens("r", 1, 5, 0, (SampledToken(1),))]))
    assert rig.core.counters.broken_streams == 1
    assert rig.start()[1].attempt == 2


def test_old_attempt_is_ignored_counted_and_aborted_once_per_message(rig):
    first, second = rig.join("d0", "both"), rig.join("d1", "both")
    rig.submit()
    old = rig.start()[0]
    new = second if old == first else first
    rig.wait(0.01)
    rig.failed(retriable=True)
    assert rig.start()[0] == new
    items = [Tokens("r", 1, 0, i, (SampledToken(1000 + i),)) for i in range(3)]
    rig.say(old, Output(items))
    assert rig.core.counters.stale_messages == 3
    assert [abort.attempt for abort in rig.aborts(old)] == [1]
    assert rig.tokens["r"][0] == []


def test_wrong_incarnation_is_ignored_counted_and_aborted(rig):
    rig.join("d0", "both")
    rig.submit()
    stranger = rig.key("d0", 9)
    rig.say(stranger, Output([Tokens("r", 1, 0, 0, (SampledToken(1000),))]))
    assert rig.core.counters.stale_messages == 1
    assert [(send.message.number, send.message.body.attempt) for send in rig.sent[stranger]] == [(0, 1)]


def test_orphan_in_a_heartbeat_is_aborted_until_it_is_gone(rig):
    worker = rig.join("d0")
    rig.beat(worker, active=[("ghost", 3)])
    rig.beat(worker, active=[("ghost", 3)])
    assert len(rig.aborts(worker)) == 1
    rig.stay(2.5, worker)
    rig.beat(worker, active=[("ghost", 3)])
    assert len(rig.aborts(worker)) == 2


def test_attempt_missing_from_a_covering_heartbeat_is_retried(rig):
    worker = rig.join("d0", "both")
    rig.submit()
    rig.beat(worker, active=[], received=rig.sent[worker][-1].message.number - 1)
    assert rig.start()[1].attempt == 1
    rig.beat(worker, active=[])
    assert rig.start()[1].attempt == 2


def test_prefill_missing_from_a_covering_heartbeat_is_retried_only_before_the_first_token(rig):
    prefill, decode = rig.pair()
    rig.submit()
    rig.beat(decode)
    rig.out(1)
    rig.beat(prefill, active=[])
    assert rig.start()[1].attempt == 1
    rig.submit("s")
    rig.beat(prefill, active=[])
    assert rig.start("s")[1].attempt == 2


def test_unacknowledged_command_is_retried_elsewhere(rig):
    first, second = rig.join("d0", "both"), rig.join("d1", "both")
    rig.submit()
    deaf = rig.start()[0]
    number = rig.sent[deaf][-1].message.number
    for _ in range(9):
        rig.wait(0.25)
        for worker in (first, second):
            rig.beat(worker, **({"received": number - 1, "active": []} if worker == deaf else {}))
    start = rig.start()
    assert start[1].attempt == 2
    assert start[0] != deaf


def test_failed_prefill_makes_one_retry_and_stops_the_decode_side(rig):
    _, decode = rig.pair()
    rig.submit()
    worker, old = rig.start()
    rig.prefill_ended(ok=False, code="transfer_failed")
    assert [abort.attempt for abort in rig.aborts(decode)] == [1]
    rig.say(worker, AttemptFailed("r", old.attempt, "transfer_failed", "late echo", True))
    assert rig.start()[1].attempt == 2
    assert rig.core.counters.retries == 1


def test_auto_gives_up_hand_offs_after_two_failures_in_a_row(rig):
    prefill, decode = rig.pair()
    rig.submit()
    for _ in range(2):
        rig.prefill_ended(ok=False, code="transfer_failed")
        rig.wait(0.1)
    rig.stay(0.25, prefill, decode)
    start = rig.start()[1]
    assert (start.attempt, start.ticket) == (3, None)


def test_retry_of_one_choice_with_output_hands_its_tokens_to_a_prefill_worker(rig):
    rig.pair()
    rig.submit(max_tokens=8)
    rig.out(3)
    rig.failed(retriable=True)
    feed, start = rig.prefill()[1], rig.start()[1]
    assert unpack_ids(feed.output_ids) == unpack_ids(start.choices[0].output_ids) == [1000, 1001, 1002]


def test_retry_of_several_choices_with_output_is_local_and_leaves_finished_ones_out(rig):
    rig.pair()
    rig.submit(max_tokens=4, n=3)
    rig.out(2, choice=1)
    rig.out(1, choice=0, end="stop")
    rig.failed(retriable=True)
    start = rig.start()[1]
    assert start.ticket is None
    assert [(state.choice, len(unpack_ids(state.output_ids))) for state in start.choices] == [(1, 2), (2, 0)]


def test_retry_of_a_choice_that_has_all_its_tokens_finishes_it_by_length(rig):
    rig.join("d0", "both")
    rig.submit(max_tokens=2)
    rig.out(2)
    rig.failed(retriable=True)
    assert rig.finished["r"] == {0: "length"}
    assert rig.ends["r"].error is None


def test_not_retriable_failure_ends_with_its_own_error(rig):
    rig.pair()
    rig.submit()
    prefill = rig.prefill()[0]
    rig.failed(retriable=False, code="bad_request")
    assert isinstance(rig.ends["r"].error, BadRequest)
    assert [abort.attempt for abort in rig.aborts(prefill)] == [1]


def test_attempts_without_progress_end_with_the_last_error(make_rig):
    rig = make_rig(max_attempts=3)
    worker = rig.join("d0", "both")
    rig.submit()
    for _ in range(3):
        rig.failed(retriable=True)
        rig.stay(0.25, worker)
    assert isinstance(rig.ends["r"].error, TransferFailed)
    assert rig.ends["r"].attempts == 3


def test_attempts_with_progress_do_not_count(make_rig):
    rig = make_rig(max_attempts=2)
    worker = rig.join("d0", "both")
    rig.submit(max_tokens=8)
    for _ in range(7):
        rig.out(1)
        rig.failed(retriable=True)
        rig.stay(0.25, worker)
    assert "r" not in rig.ends
    assert len(rig.tokens["r"][0]) == 7


def test_second_retry_waits_for_the_backoff(make_rig):
    rig = make_rig(retry_backoff_s=0.5)
    rig.join("d0", "both")
    rig.submit()
    rig.failed(retriable=True)
    rig.failed(retriable=True)
    assert rig.start()[1].attempt == 2
    rig.wait(0.4)
    assert rig.start()[1].attempt == 2
    rig.wait(0.2)
    assert rig.start()[1].attempt == 3


def test_retry_avoids_the_worker_that_failed(rig):
    first, second = rig.join("d0", "both"), rig.join("d1", "both")
    rig.submit()
    failed = rig.start()[0]
    rig.failed(retriable=True)
    assert rig.start()[0] == (second if failed == first else first)


def test_lost_prefill_after_the_first_token_does_not_matter(rig):
    rig.pair()
    rig.submit()
    rig.out(1)
    rig.do(rig.core.worker_lost("p0", "killed"))
    rig.out(3, end="length")
    assert rig.ends["r"].attempts == 1


def test_request_without_a_worker_waits_then_is_unavailable(rig):
    rig.submit(timeout_s=100)
    rig.wait(29)
    assert rig.ends == {}
    rig.wait(1.5)
    assert isinstance(rig.ends["r"].error, Unavailable)


def test_request_waiting_for_room_is_not_ended_as_unavailable(rig):
    worker = rig.join("d0", "both", blocks=4)
    rig.submit("a", prompt=12, timeout_s=500)
    rig.submit("b", prompt=12, timeout_s=500)
    rig.stay(40, worker)
    assert rig.ends == {}
    assert rig.core.status().queued_requests == 1
    rig.finish("a", worker)
    assert rig.start("b")[1].attempt == 1


def test_waiting_requests_go_in_order_and_a_retried_one_before_younger_ones(rig):
    for name in "abc":
        rig.submit(name, prompt=12)
    worker = rig.join("d0", "both", blocks=4)
    assert rig.start("a")[0] == worker
    rig.failed(retriable=True, request_id="a")
    assert rig.start("a")[1].attempt == 2
    with pytest.raises(ValueError, match="empty"):
        rig.start("b")


def test_deadline_ends_and_aborts_and_timeouts_on_the_wire_are_what_remains(rig):
    rig.submit(timeout_s=5)
    rig.wait(2)
    worker = rig.join("d0", "both")
    assert rig.start()[1].timeout_s == pytest.approx(3)
    rig.stay(3, worker)
    assert isinstance(rig.ends["r"].error, DeadlineExceeded)
    assert [abort.attempt for abort in rig.aborts(worker)] == [1]


def test_cancelled_choice_delivers_nothing_more_and_the_others_go_on(rig):
    worker = rig.join("d0", "both")
    rig.submit(max_tokens=4, n=2)
    rig.out(1, choice=0)
    rig.cancel(choice=0)
    assert [(abort.attempt, abort.choice) for abort in rig.aborts(worker)] == [(1, 0)]
    before = len(rig.events["r"])
    rig.out(1, choice=0)
    assert len(rig.events["r"]) == before
    rig.out(4, choice=1, end="length")
    assert rig.ends["r"].error is None


def test_cancelling_every_choice_ends_the_request_and_stops_both_sides(rig):
    prefill, decode = rig.pair()
    rig.submit(n=2)
    rig.cancel(choice=1)
    rig.cancel(choice=1)
    rig.cancel(choice=0)
    assert rig.ends["r"].error is None
    assert [abort.choice for abort in rig.aborts(decode)] == [1, None]
    assert [abort.choice for abort in rig.aborts(prefill)] == [None]


def test_cancel_of_unknown_or_ended_requests_is_ignored(rig):
    rig.join("d0", "both")
    rig.submit(max_tokens=1)
    rig.out(1, end="length")
    assert rig.cancel("r") == rig.cancel("nobody") == rig.cancel("r", choice=0) == []


def test_reused_request_id_goes_on_with_the_attempt_numbers(rig):
    rig.join("d0", "both")
    rig.submit(max_tokens=1)
    rig.out(1, end="length")
    del rig.ends["r"]
    rig.submit(max_tokens=1)
    assert rig.start()[1].attempt == 2
    rig.out(1, end="length")
    assert rig.ends["r"].attempts == 1


def test_request_longer_than_any_worker_is_refused_with_the_numbers(rig):
    rig.join("d0", longest=64)
    with pytest.raises(BadRequest, match="60 tokens plus max_tokens 5 is 65 tokens, this model serves at most 64"):
        rig.submit(prompt=60, max_tokens=5)
    rig.submit(prompt=60, max_tokens=4)


def test_request_goes_only_to_a_worker_that_is_long_enough(rig):
    rig.join("d0", "both", longest=32)
    big = rig.join("d1", "both", longest=64)
    for name in "abc":
        rig.submit(name, prompt=40)
        assert rig.start(name)[0] == big


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"prompt_ids": []}, "no tokens"),
        ({"prompt_ids": [-1]}, "token ids"),
        ({"prompt_ids": [2**31]}, "token ids"),
        ({"prompt_ids": [0] * (2**20 + 1)}, "bound is 1048576"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"cache_salt": "s" * 1001}, "cache_salt"),
        ({"params": SamplingParams(max_tokens=0)}, "max_tokens"),
    ],
)
def test_submit_of_what_no_worker_would_decode_is_a_bad_request(rig, changes, message):
    fields = {"request_id": "r", "prompt_ids": [1], "params": SamplingParams(), "timeout_s": 1.0} | changes
    with pytest.raises(BadRequest, match=message):
        rig.core.submit(GenerateRequest(**fields))
    rig.core.check_invariants()
    assert rig.core.status().active_requests == 0


def test_submit_over_the_bounds_is_overloaded_and_changes_nothing(make_rig):
    rig = make_rig(max_queued_requests=2, max_active_requests=3)
    rig.submit("a")
    rig.submit("b")
    with pytest.raises(Overloaded, match="2 requests wait"):
        rig.submit("c")
    rig.join("d0", "both")
    rig.submit("c")
    with pytest.raises(Overloaded, match="3 requests are active"):
        rig.submit("d")
    with pytest.raises(Overloaded):
        rig.submit("a")
    rig.core.check_invariants()


def test_submit_of_an_id_in_use_is_refused(rig):
    rig.submit("a")
    with pytest.raises(BadRequest, match="in use"):
        rig.core.submit(GenerateRequest("a", [1], SamplingParams(), 1.0))
    rig.core.check_invariants()


def test_drain_refuses_new_requests_and_lets_running_ones_finish(rig):
    worker = rig.join("d0", "both")
    rig.submit()
    rig.do(rig.core.drain())
    with pytest.raises(Unavailable, match="draining"):
        rig.submit("late")
    assert not rig.core.status().ready
    rig.finish("r", worker)
    assert rig.ends["r"].error is None


def test_end_all_ends_every_request_with_the_error(rig):
    rig.join("d0", "both")
    rig.submit("a")
    rig.submit("b")
    rig.do(rig.core.end_all(Unavailable("stopping")))
    assert sorted(rig.ends) == ["a", "b"]


def test_reset_prefix_cache_tells_every_live_worker(rig):
    prefill, decode = rig.pair()
    rig.do(rig.core.reset_prefix_cache())
    assert rig.bodies(prefill)[-1] == rig.bodies(decode)[-1] == "ResetPrefixCache"


def test_draining_worker_gets_nothing_new(rig):
    first, second = rig.join("d0", "both"), rig.join("d1", "both")
    rig.beat(first, state="draining")
    for name in "abc":
        rig.submit(name)
        assert rig.start(name)[0] == second


@pytest.mark.parametrize(
    ("mode", "limit", "prompt", "is_local"),
    [
        ("auto", 0, 10, False),
        ("auto", 10, 10, True),
        ("auto", 9, 10, False),
        ("never", 0, 10, True),
        ("always", 64, 10, False),
    ],
)
def test_local_prefill_follows_the_settings(make_rig, mode, limit, prompt, is_local):
    rig = make_rig(disaggregate=mode, local_prefill_max_tokens=limit)
    rig.pair()
    rig.submit(prompt=prompt)
    assert (rig.start()[1].ticket is None) == is_local


def test_prompt_held_by_decode_is_prefilled_there(make_rig):
    rig = make_rig(local_prefill_max_tokens=4)
    rig.pair()
    rig.submit("a", prompt=18)
    rig.submit("b", prompt=18)
    assert rig.start("a")[1].ticket is not None
    assert rig.start("b")[1].ticket is None


def test_always_waits_for_a_linked_prefill_worker(make_rig):
    rig = make_rig(disaggregate="always")
    decode = rig.join("d0")
    rig.submit()
    assert "StartDecode" not in rig.bodies(decode)
    prefill = rig.join("p0", "prefill")
    rig.beat(decode, links=[prefill])
    assert rig.prefill()[0] == prefill


def test_worker_of_both_roles_prefills_itself_in_auto(rig):
    rig.join("p0", "prefill")
    rig.join("b0", "both")
    rig.submit()
    assert rig.start()[1].ticket is None


def test_ready_at_the_start_needs_the_whole_cluster_once(make_rig):
    rig = make_rig(expected_workers=2)
    decode = rig.join("d0")
    assert rig.core.status().why_not_ready == "1 of 2 workers are ready"
    prefill = rig.join("p0", "prefill")
    assert "linked" in rig.core.status().why_not_ready
    rig.beat(decode, links=[prefill])
    assert rig.core.status().ready
    rig.goodbye(prefill)
    assert rig.core.status().ready
    rig.goodbye(decode)
    assert rig.core.status().why_not_ready == "no decode worker is ready"


def test_status_shows_load_links_and_limits(rig):
    rig.pair()
    rig.submit()
    status = rig.core.status()
    assert (status.active_requests, status.queued_requests, status.bytes_per_token) == (1, 0, 64)
    assert [(row.worker_id, row.role, row.pid, row.transports) for row in status.workers] == [
        ("d0", "decode", 100, {"p0": "shm"}),
        ("p0", "prefill", 100, {}),
    ]
    assert status.max_sequence_tokens == 1000


def test_next_deadline_is_never_in_the_past_after_a_tick(rig):
    worker = rig.join("d0", "both")
    rig.submit(max_tokens=64)
    rig.out(1)
    for _ in range(40):
        rig.wait(0.25)
        rig.beat(worker, received=0)
        assert rig.core.next_deadline > rig.clock.now()


def test_config_refuses_settings_that_make_no_sense():
    with pytest.raises(ConfigError, match="policy"):
        RouterConfig(policy="random")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_attempts 0"):
        RouterConfig(max_attempts=0)


def test_errors_of_ended_requests_name_the_worker(make_rig):
    rig = make_rig(max_attempts=1)
    rig.join("d0", "both")
    rig.submit()
    rig.do(rig.core.worker_lost("d0", "exit 9"))
    assert isinstance(rig.ends["r"].error, NodeLost)
    assert str(rig.ends["r"].error) == "worker d0 was lost: exit 9"


def test_unknown_error_code_becomes_an_internal_error(rig):
    rig.join("d0", "both")
    rig.submit()
    rig.failed(retriable=False, code="flux")
    assert isinstance(rig.ends["r"].error, InternalError)
    assert not isinstance(rig.ends["r"].error, ProtocolError)


def test_memory_of_ended_requests_is_bounded(rig):
    worker = rig.join("d0", "both")
    for i in range(4200):
        rig.core.submit(GenerateRequest(f"q{i}", [1], SamplingParams(max_tokens=1), 60.0))
        rig.core.cancel(f"q{i}")
    assert len(rig.core._life.table._ended) == 4096
    assert len(rig.core._registry.find(worker)._aborts) <= 8192
    assert len(rig.core._timers) == 1
    assert len(rig.core._timers._heap) < 200
