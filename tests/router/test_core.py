"""The router core, event by event: who gets which command, what the caller sees, what is ignored."""

from __future__ import annotations

import pytest

from penstock.core.errors import BadRequest, TransferFailed
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other"),
        ("weights", "w1"),
        ("dtype", "float8"),
        ("num_layers", 3),
        ("num_kv_heads", 1),
        ("head_dim", 16),
        ("layout", "layer-major"),
        ("protocol", 1),
    ],
)
def test_hello_with_other_fingerprint_is_refused_with_the_field_named(rig, field, value):
    rig.join("d0")
    other, was = rig.key("d1"), getattr(rig.fingerprint, field)
    rig.hello(other, **{field: value})
    assert rig.sent[other] == []
    (row,) = [row for row in rig.core.status().workers if row.worker_id == "d1"]
    assert row.state.startswith(f"refused: {field} differs: {value!r} here, {was!r} there")


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"block_size": 8}, {"dtype": "float16", "block_size": 32}])
def test_hello_with_another_cache_format_is_welcome(rig, changes):
    """Blocks are converted on their way between such workers."""
    rig.join("d0")
    other = rig.key("d1")
    rig.hello(other, **changes)
    assert "Welcome" in rig.bodies(other)


def test_refused_worker_is_taken_when_the_others_are_gone(rig):
    first, other = rig.join("d0"), rig.key("d1")
    rig.hello(other, dtype="float8")
    assert rig.sent[other] == []
    rig.goodbye(first)
    rig.hello(other, dtype="float8")
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


@pytest.mark.parametrize("code", ["bad_request", "deadline_exceeded"])
def test_prefill_that_refuses_the_request_itself_ends_it_and_blames_nobody(rig, code):
    _, decode = rig.pair()
    rig.submit()
    rig.prefill_ended(ok=False, code=code)
    assert rig.ends["r"].error.code == code
    assert rig.core.counters.retries == 0
    assert all(row.state == "ready" for row in rig.core.status().workers)
    assert [abort.attempt for abort in rig.aborts(decode)] == [1], "the decode side is told"


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
