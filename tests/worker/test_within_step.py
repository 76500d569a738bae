"""What is handled while a step computes, and what waits for its end."""

from __future__ import annotations

from collections import deque

import pytest

from penstock.core.ids import MAIN_ROUTER, AttemptKey, Ticket, WorkerKey
from penstock.kvtransfer.effects import BlocksArrived, MessageArrived, PeerLost, PeerUp, Revoked
from penstock.protocol.messages import (
    Abort,
    Cancel,
    ChoiceState,
    Drain,
    Failed,
    FromRouter,
    Grant,
    HandoffMessage,
    Peers,
    Renew,
    ResetPrefixCache,
    StartDecode,
    ToWorker,
    pack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.worker.within_step import Item, take_now

EPOCH, OTHER = "a" * 16, "b" * 16
EPOCHS = {MAIN_ROUTER: EPOCH}
PEER = WorkerKey("prefill-0", "0" * 16)
TICKET = Ticket(b"t" * 16)
START = StartDecode("r", 1, pack_ids([1, 2]), SamplingParams(), [ChoiceState(0)], 10.0)
GRANT = Grant(TICKET, 1, 0, 2)
ARRIVED = BlocksArrived(PEER, TICKET, 1, (0,))


def frame(body: ToWorker, epoch: str = EPOCH, number: int = 1) -> FromRouter:
    return FromRouter(epoch, number, body)


def says(message: HandoffMessage) -> MessageArrived:
    return MessageArrived(PEER, message)


def taken(*items: Item, has_prefill: bool = False, is_full: bool = False) -> tuple[list[Item], list[Item]]:
    """(taken now, left waiting), while attempt 1 of request "busy" is computed."""
    waiting = deque(items)
    return list(take_now(waiting, EPOCHS, {AttemptKey("busy", 1)}, has_prefill, lambda: is_full)), list(waiting)


@pytest.mark.parametrize(
    "item",
    [
        frame(START),
        frame(Peers([])),
        frame(Abort("waits", 1)),
        frame(Abort("busy", 2)),
        says(GRANT),
        says(Renew([TICKET])),
        says(Failed(TICKET, "internal_error", "x")),
        ARRIVED,
        Revoked(PEER, TICKET),
        PeerUp(PEER, "shm"),
        PeerLost(PEER, "x"),
    ],
)
def test_what_leaves_the_batch_alone_is_taken_now(item: Item) -> None:
    assert taken(item) == ([item], [])


@pytest.mark.parametrize(
    "item",
    [
        frame(Abort("busy", 1)),
        frame(Abort("busy", 1, 0)),
        frame(ResetPrefixCache()),
        frame(Drain()),
        says(Cancel(TICKET, "cancelled", "x")),
    ],
)
def test_what_may_end_a_sequence_of_the_batch_waits_and_is_overtaken(item: Item) -> None:
    assert taken(item, frame(START), ARRIVED) == ([frame(START), ARRIVED], [item])


def test_start_on_a_full_worker_waits_for_the_abort_that_makes_its_place() -> None:
    abort, start = frame(Abort("busy", 1)), frame(START)
    assert taken(abort, start, ARRIVED, is_full=True) == ([ARRIVED], [abort, start])


def test_abort_of_a_sequence_that_waits_makes_place_within_the_step() -> None:
    abort, start = frame(Abort("waits", 1)), frame(START)
    waiting: deque[Item] = deque([abort, start])
    handled: list[Item] = []
    for item in take_now(waiting, EPOCHS, set(), False, lambda: not handled):
        handled.append(item)  # noqa: PERF402  the next one depends on it
    assert handled == [abort, start]


def test_lost_link_of_a_worker_that_prefills_holds_up_all_that_came_behind_it() -> None:
    """What it hands over may be in the batch, and the link's successor speaks next."""
    lost, up = PeerLost(PEER, "x"), PeerUp(PEER, "shm")
    assert taken(ARRIVED, lost, up, frame(START), has_prefill=True) == ([ARRIVED], [lost, up, frame(START)])


def test_frame_of_another_router_holds_up_all_that_came_behind_it() -> None:
    assert taken(frame(START, OTHER), ARRIVED) == ([], [frame(START, OTHER), ARRIVED])
    waiting: deque[Item] = deque([frame(START)])
    assert list(take_now(waiting, {}, set(), False, lambda: False)) == [], "nor is the first frame of the first router"
