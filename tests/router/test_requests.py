from __future__ import annotations

import pytest

from penstock.core.errors import InternalError, NodeLost
from penstock.core.ids import AttemptKey, WorkerKey
from penstock.protocol.messages import SampledToken, Tokens
from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import GenerateRequest
from penstock.router.requests import Attempt, Choice, RequestRecord, State, Verdict

WORKER = WorkerKey("d0", "0" * 16)


def record(n=1, prompt=10):
    request = GenerateRequest("r", list(range(prompt)), SamplingParams(max_tokens=8, n=n), 10.0)
    return RequestRecord(request, 1, b"", 0.0, 10.0)


def attempt(number=1):
    return Attempt(AttemptKey("r", number), WORKER, None, None, 0.0, 3, 10)


TRANSITIONS = {
    "to_dispatched": lambda r: r.to_dispatched(attempt(), 1.0),
    "to_running": lambda r: r.to_running(),
    "to_waiting": lambda r: r.to_waiting(NodeLost("x"), (WORKER,), 5.0),
    "to_ended": lambda r: r.to_ended(),
}
PATHS = {
    State.WAITING: [],
    State.DISPATCHED: ["to_dispatched"],
    State.RUNNING: ["to_dispatched", "to_running"],
    State.ENDED: ["to_ended"],
}
ALLOWED = {
    (State.WAITING, "to_dispatched"): State.DISPATCHED,
    (State.WAITING, "to_ended"): State.ENDED,
    (State.DISPATCHED, "to_running"): State.RUNNING,
    (State.DISPATCHED, "to_waiting"): State.WAITING,
    (State.DISPATCHED, "to_ended"): State.ENDED,
    (State.RUNNING, "to_waiting"): State.WAITING,
    (State.RUNNING, "to_ended"): State.ENDED,
}


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_transition_is_allowed_or_refused(state, transition):
    subject = record()
    for step in PATHS[state]:
        TRANSITIONS[step](subject)
    target = ALLOWED.get((state, transition))
    if target is None:
        with pytest.raises(InternalError, match=f"transition from {state.name}"):
            TRANSITIONS[transition](subject)
        assert subject.state is state
    else:
        TRANSITIONS[transition](subject)
        assert subject.state is target


def test_fruitless_attempts_are_counted_in_a_row():
    subject = record()
    for number, has_progress in enumerate([False, False, True, False], 1):
        subject.to_dispatched(attempt(number), 1.0)
        subject.attempt.has_progress = has_progress
        subject.to_waiting(NodeLost("x"), (), 5.0)
    assert (subject.fruitless, subject.num_attempts) == (1, 4)


def test_blocks_share_the_full_blocks_of_the_prompt():
    assert record(prompt=10).blocks(4) == 3
    assert record(prompt=11).blocks(4) == 3
    assert record(prompt=12).blocks(4) == 4
    assert record(n=3, prompt=10).blocks(4) == 5
    many = record(n=3, prompt=10)
    many.choices[0].output_ids = [1, 2]
    many.choices[1].is_finished = True
    assert many.blocks(4) == 2 + 2 + 1


@pytest.mark.parametrize(
    ("have", "index", "count", "end", "verdict"),
    [
        (2, 2, 1, None, (Verdict.NEW, 0)),
        (2, 1, 2, None, (Verdict.NEW, 1)),
        (2, 2, 0, "stop", (Verdict.NEW, 0)),
        (2, 1, 1, "stop", (Verdict.NEW, 1)),
        (2, 0, 2, None, (Verdict.DUPLICATE, 2)),
        (2, 2, 0, None, (Verdict.DUPLICATE, 0)),
        (2, 0, 1, "stop", (Verdict.DUPLICATE, 2)),
        (2, 3, 1, None, (Verdict.BROKEN, 0)),
        (2, 2, 7, None, (Verdict.BROKEN, 0)),
    ],
)
def test_judge_of_tokens(have, index, count, end, verdict):
    choice = Choice(0, output_ids=list(range(have)))
    item = Tokens("r", 1, 0, index, tuple(SampledToken(i) for i in range(count)), end)
    assert choice.judge(item, max_tokens=8) == verdict
