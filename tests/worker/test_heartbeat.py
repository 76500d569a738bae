"""What a heartbeat says while the loop is busy."""

from __future__ import annotations

from penstock.core.ids import AttemptKey
from penstock.protocol.messages import Abort, ChoiceState, FromRouter, StartDecode, WorkerLoad, pack_ids
from penstock.protocol.sampling import SamplingParams
from penstock.worker.core import Snapshot
from penstock.worker.heartbeat import HeartbeatBuilder


def start(number: int, request_id: str, epoch: str = "a" * 16) -> FromRouter:
    body = StartDecode(request_id, 1, pack_ids([1]), SamplingParams(), [ChoiceState(0)], 10.0)
    return FromRouter(epoch, number, body)


def snapshot(handled: int, *active: str, epoch: str = "a" * 16) -> Snapshot:
    return Snapshot(epoch, handled, "ready", WorkerLoad(), tuple(AttemptKey(name, 1) for name in active))


def test_command_not_yet_handled_counts_as_received_and_active() -> None:
    builder = HeartbeatBuilder()
    builder.on_frame(start(1, "one"))
    builder.on_frame(start(2, "two"))
    beat = builder.build(snapshot(1, "one"), [])
    assert (beat.received, beat.active) == (2, [("one", 1), ("two", 1)])


def test_command_handled_and_ended_is_no_longer_active() -> None:
    builder = HeartbeatBuilder()
    builder.on_frame(start(1, "one"))
    builder.on_frame(FromRouter("a" * 16, 2, Abort("one", 1)))
    beat = builder.build(snapshot(2), [])
    assert (beat.received, beat.active) == (2, [])


def test_new_router_epoch_starts_the_count_anew() -> None:
    builder = HeartbeatBuilder()
    builder.on_frame(start(40, "old"))
    builder.on_frame(start(1, "new", epoch="b" * 16))
    beat = builder.build(snapshot(40, "old"), [])
    assert beat.received == 1
    assert ("new", 1) in beat.active


def test_before_the_first_snapshot_the_worker_is_starting() -> None:
    beat = HeartbeatBuilder().build(None, [])
    assert (beat.state, beat.active) == ("starting", [])


def test_loop_that_turns_slowly_is_ready_and_tells_its_age() -> None:
    beat = HeartbeatBuilder(max_step_s=5.0).build(snapshot(0), [], turn_age_s=4.9)
    assert (beat.state, beat.turn_age_s) == ("ready", 4.9)


def test_loop_that_does_not_turn_is_stalled_until_it_turns_again() -> None:
    builder = HeartbeatBuilder(max_step_s=5.0)
    builder.on_frame(start(1, "one"))
    assert builder.build(snapshot(0), [], turn_age_s=5.1).state == "stalled"
    assert builder.build(None, [], turn_age_s=5.1).state == "stalled"
    beat = builder.build(snapshot(1, "one"), [], turn_age_s=0.0)
    assert (beat.state, beat.active) == ("ready", [("one", 1)])
