"""What a worker counts of its steps."""

from __future__ import annotations

import pytest

from penstock.core.errors import InternalError
from penstock.core.ids import AttemptKey
from penstock.engine.interface import ScheduledSeq
from penstock.engine.sequence import Sequence
from penstock.protocol.messages import SampledToken
from penstock.protocol.sampling import SamplingParams
from penstock.worker.usage import Usage, note_chunks, prefill_phases

TOKEN = SampledToken(1)


def sequence(num_prompt: int, num_output: int = 0, computed: int = 0, arrival: float = 10.0) -> Sequence:
    params = SamplingParams(max_tokens=50)
    seq = Sequence(AttemptKey("r", 1), 0, [5] * num_prompt, params, b"", arrival, 1e9, [7] * num_output)
    seq.num_computed_tokens = computed
    return seq


def test_prompts_and_drawn_tokens_are_counted_apart_and_failures_not() -> None:
    usage = Usage()
    entries = [
        ScheduledSeq(sequence(20), 8),
        ScheduledSeq(sequence(4, 3, computed=6), 1, draft=(9, 9)),
        ScheduledSeq(sequence(30), 9),
    ]
    usage.begin(1.0)
    usage.end(entries, [(), (TOKEN, TOKEN), InternalError("x")], 1.5)
    assert (usage.busy_s, usage.prefill_tokens, usage.decode_tokens) == (0.5, 8, 2)
    usage.begin(9.0)  # nothing to do
    usage.begin(10.0)
    usage.end(entries[:1], [()], 10.25)
    assert (usage.busy_s, usage.prefill_tokens) == (0.75, 16)


def test_a_shared_step_counts_wholly_for_each_and_in_part_as_work() -> None:
    long, short, running = sequence(20), sequence(4), sequence(4, 1, computed=4)
    note_chunks([(ScheduledSeq(long, 12), ()), (ScheduledSeq(short, 3), ()), (ScheduledSeq(running, 1), ())], 0.16)
    assert (long.compute_s, short.compute_s, running.compute_s) == (0.16, 0.16, 0.0)
    assert [long.work_s, short.work_s] == pytest.approx([0.12, 0.03])


def test_phases_tell_queue_steps_and_the_wait_between_them() -> None:
    seq = sequence(20)
    seq.first_scheduled = 12.0
    for step_s in (0.5, 0.25):
        note_chunks([(ScheduledSeq(seq, 10), ())], step_s)
    phases = prefill_phases(seq, 0.25, 13.0)
    assert (phases.queue_s, phases.prefill_s, phases.compute_s, phases.first_step_s) == (2.0, 1.0, 0.75, 0.25)
    assert phases.work_s == 0.75


def test_phases_never_claim_more_steps_than_time() -> None:
    seq = sequence(4)
    seq.first_scheduled = 12.0
    note_chunks([(ScheduledSeq(seq, 4), ())], 5.0)
    phases = prefill_phases(seq, 5.0, 12.5)
    assert (phases.prefill_s, phases.compute_s, phases.first_step_s) == (0.5, 0.5, 0.5)
