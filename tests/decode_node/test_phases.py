"""How decode divides the way of a hand-off, and the time of its steps."""

from __future__ import annotations

import pytest

from penstock.core.ids import AttemptKey
from penstock.decode_node.phases import StepClock, received_phases
from penstock.engine.interface import ScheduledSeq
from penstock.engine.sequence import Sequence
from penstock.protocol.messages import Done, Phases
from penstock.protocol.sampling import SamplingParams

DONE = Done(b"t" * 16, 1, 5, 20, (), Phases(queue_s=1.0, prefill_s=2.0, compute_s=1.5, first_step_s=0.5, work_s=1.5))


def sequence(num_output: int = 0, computed: int = 0) -> Sequence:
    seq = Sequence(AttemptKey("r", 1), 0, [5] * 20, SamplingParams(max_tokens=50), b"", 10.0, 1e9, [7] * num_output)
    seq.num_computed_tokens = computed
    return seq


def told(clock: StepClock) -> tuple[float, float]:
    step = clock.told()
    assert step is not None
    return step.step_s, step.prompts_s


@pytest.mark.parametrize(
    ("granted_at", "room_s"),
    [(None, 0.0), (11.0, 0.0), (13.0, 0.0), (13.25, 0.25), (13.5, 0.5), (99.0, 0.5)],
)
def test_room_is_what_passed_without_it_after_prefill_was_done(granted_at: float | None, room_s: float) -> None:
    phases = received_phases(sequence(), DONE, 100, 13.5, granted_at, num_given=1)
    assert (phases.transfer_s, phases.room_s) == (0.5, room_s)
    assert (phases.queue_s, phases.prefill_s, phases.compute_s, phases.work_s) == (1.0, 2.0, 1.5, 1.5)
    assert phases.transferred_bytes == 400


def test_step_with_a_prompt_says_what_the_prompt_took() -> None:
    clock, running, prompt = StepClock(), sequence(3, 22), sequence()
    for start in (1.0, 2.0):
        clock.begin(start)
        clock.end([(ScheduledSeq(running, 1), ())], start + 0.010)
        assert told(clock) == pytest.approx((0.010, 0.0))
        clock.forget()
    clock.begin(3.0)
    clock.end([(ScheduledSeq(running, 1), ()), (ScheduledSeq(prompt, 8), ())], 3.050)
    assert told(clock) == pytest.approx((0.050, 0.040))
    assert prompt.compute_s == pytest.approx(0.050)
    assert running.compute_s == 0.0


def test_before_any_step_without_prompts_tokens_decide() -> None:
    clock = StepClock()
    clock.begin(3.0)
    clock.end([(ScheduledSeq(sequence(3, 22), 1), ()), (ScheduledSeq(sequence(), 9), ())], 3.100)
    assert told(clock) == pytest.approx((0.1, 0.09))


def test_wait_is_from_the_tokens_before_to_the_step() -> None:
    clock, seq = StepClock(), sequence(3, 22)
    assert clock.wait_s(seq, 1.0) == 0.0  # with the hand-off
    clock.begin(1.25)
    clock.end([(ScheduledSeq(seq, 1), ())], 1.5)
    assert clock.wait_s(seq, 1.5) == 0.25
    clock.forget()
    assert clock.told() is None
    clock.begin(1.5)
    clock.end([(ScheduledSeq(seq, 1), ())], 1.6)
    assert clock.wait_s(seq, 1.6) == 0.0
