"""The router core as its caller meets it: waiting, deadlines, cancels, limits, placement, readiness, errors."""

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
    Unavailable,
)
from penstock.core.ids import AttemptKey
from penstock.core.tickets import TicketFacts, is_proven
from penstock.protocol.sampling import SamplingParams
from penstock.router.config import RouterConfig
from penstock.router.interface import GenerateRequest


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


def test_worker_that_says_cancelled_does_not_end_what_the_caller_still_wants(rig):
    """The last tokens of choice 0 are lost, and the worker has nothing left but choice 1, which the caller cancels."""
    worker = rig.join("d0", "both")
    rig.submit(max_tokens=4, n=2)
    rig.out(3, choice=0)
    rig.cancel(choice=1)
    rig.failed(retriable=False, code="cancelled")
    assert rig.ends == {}
    assert rig.core.counters.broken_streams == 1
    assert [state.choice for state in rig.start()[1].choices] == [0]
    rig.finish("r", worker)
    assert (rig.ends["r"].error, rig.ends["r"].attempts) == (None, 2)
    assert rig.finished["r"] == {0: "length"}


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


def test_worker_gets_no_more_attempts_than_it_takes_and_the_next_request_waits(rig):
    worker = rig.join("d0", "both", max_requests=2)
    for name in "abc":
        rig.submit(name)
    assert rig.live_on(worker) == [("a", 1), ("b", 1)]
    assert rig.core.status().queued_requests == 1
    rig.out(4, request_id="b", end="length")
    assert rig.live_on(worker) == [("a", 1), ("c", 1)]
    rig.finish("a", worker)
    rig.finish("c", worker)
    assert [end.attempts for end in rig.ends.values()] == [1, 1, 1]


def test_worker_that_takes_nothing_by_its_own_word_is_tried_with_one(rig):
    worker = rig.join("d0", "both", max_requests=0)
    rig.submit("a")
    rig.submit("b")
    assert rig.live_on(worker) == [("a", 1)]


def test_full_prefill_queue_makes_decode_prefill_itself_in_auto(rig):
    rig.join("p0", "prefill", max_requests=1)
    rig.join("d0")
    for name in "ab":
        rig.submit(name)
    assert [rig.start(name)[1].ticket is None for name in "ab"] == [False, True]
    rig.prefill_ended(request_id="a")
    rig.submit("c")
    assert rig.start("c")[1].ticket is not None


def test_always_waits_for_a_place_in_a_prefill_queue(make_rig):
    rig = make_rig(disaggregate="always")
    rig.join("p0", "prefill", max_requests=1)
    decode = rig.join("d0")
    for name in "ab":
        rig.submit(name)
    assert rig.live_on(decode) == [("a", 1)]
    rig.prefill_ended(request_id="a")
    assert rig.live_on(decode) == [("a", 1), ("b", 1)]
    assert rig.start("b")[1].ticket is not None


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
        RouterConfig(policy="astrology")  # type: ignore[arg-type]
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


def test_both_commands_of_every_attempt_carry_a_proof_of_their_own_ticket(rig):
    """Each worker can check it against what it was told and who it is; a retry's tokens are bound too."""
    rig.pair()
    rig.submit(max_tokens=9)
    proofs, tickets = set(), set()
    for _ in range(2):
        decode, start_decode = rig.start()
        prefill, start_prefill = rig.prefill()
        tokens = start_prefill.prompt_ids + start_prefill.output_ids
        assert tokens == start_decode.prompt_ids + start_decode.choices[0].output_ids
        attempt = AttemptKey("r", start_decode.attempt)
        facts = TicketFacts(start_decode.ticket, prefill, decode, attempt, tokens, start_decode.timeout_s)
        assert is_proven(rig.cluster_key, facts, start_decode.proof)
        assert start_prefill.proof == start_decode.proof
        assert (start_prefill.timeout_s, start_prefill.ticket) == (start_decode.timeout_s, start_decode.ticket)
        proofs.add(start_decode.proof)
        tickets.add(start_decode.ticket)
        rig.out(3)
        rig.failed(retriable=True)
    assert len(proofs) == len(tickets) == 2
