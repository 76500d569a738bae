"""What a heartbeat says while the loop is busy."""

from __future__ import annotations

from penstock.core.ids import MAIN_ROUTER, AttemptKey
from penstock.protocol.messages import Abort, ChoiceState, FromRouter, StartDecode, WorkerLoad, pack_ids
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.worker.core import Snapshot
from penstock.worker.heartbeat import HeartbeatBuilder
from penstock.worker.turn_watch import TurnWatch


def start(number: int, request_id: str, epoch: str = "a" * 16) -> FromRouter:
    body = StartDecode(request_id, 1, pack_ids([1]), SamplingParams(), [ChoiceState(0)], 10.0)
    return FromRouter(epoch, number, body)


def snapshot(handled: int, *active: str, epoch: str = "a" * 16) -> Snapshot:
    return Snapshot(
        {MAIN_ROUTER: (epoch, handled)}, "ready", WorkerLoad(), tuple(AttemptKey(name, 1) for name in active)
    )


def test_command_not_yet_handled_counts_as_received_and_active() -> None:
    builder = HeartbeatBuilder(TurnWatch(FakeClock()))
    builder.on_frame(start(1, "one"))
    builder.on_frame(start(2, "two"))
    beat = builder.build(snapshot(1, "one"), [])
    assert (beat.received, beat.active) == (2, [("one", 1), ("two", 1)])


def test_command_handled_and_ended_is_no_longer_active() -> None:
    builder = HeartbeatBuilder(TurnWatch(FakeClock()))
    builder.on_frame(start(1, "one"))
    builder.on_frame(FromRouter("a" * 16, 2, Abort("one", 1)))
    beat = builder.build(snapshot(2), [])
    assert (beat.received, beat.active) == (2, [])


def test_new_router_epoch_starts_the_count_anew() -> None:
    builder = HeartbeatBuilder(TurnWatch(FakeClock()))
    builder.on_frame(start(40, "old"))
    builder.on_frame(start(1, "new", epoch="b" * 16))
    beat = builder.build(snapshot(40, "old"), [])
    assert beat.received == 1
    assert ("new", 1) in beat.active


def test_before_the_first_snapshot_the_worker_is_starting() -> None:
    beat = HeartbeatBuilder(TurnWatch(FakeClock())).build(None, [])
    assert (beat.state, beat.active) == ("starting", [])


def test_loop_that_turns_slowly_is_ready_and_tells_its_age() -> None:
    clock = FakeClock()
    builder = HeartbeatBuilder(TurnWatch(clock, max_step_s=5.0))
    clock.advance(5.0)
    beat = builder.build(snapshot(0), [])
    assert (beat.state, beat.turn_age_s) == ("ready", 5.0)


def test_loop_that_does_not_turn_is_stalled_until_it_turns_again() -> None:
    clock = FakeClock()
    turns = TurnWatch(clock, max_step_s=5.0)
    builder = HeartbeatBuilder(turns)
    builder.on_frame(start(1, "one"))
    clock.advance(5.5)
    assert turns.is_stalled()
    assert builder.build(snapshot(0), []).state == "stalled"
    assert builder.build(None, []).state == "stalled"
    turns.turn()
    beat = builder.build(snapshot(1, "one"), [])
    assert (beat.state, beat.turn_age_s, beat.active) == ("ready", 0.0, [("one", 1)])


def test_frame_of_an_incarnation_that_was_replaced_is_dropped() -> None:
    builder = HeartbeatBuilder(TurnWatch(FakeClock()))
    assert builder.on_frame(start(40, "old"))
    assert builder.on_frame(start(1, "new", epoch="b" * 16))
    assert not builder.on_frame(start(41, "older than it looks"))
    assert builder.build(snapshot(0), []).active == [("new", 1)]
