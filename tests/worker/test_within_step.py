"""What is handled while a step computes, and what waits for its end."""

from __future__ import annotations

from collections import deque

import pytest

from penstock.core.ids import Ticket, WorkerKey
from penstock.kvtransfer.effects import BlocksArrived, MessageArrived, PeerLost, PeerUp, Revoked
from penstock.protocol.messages import (
    Abort,
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
PEER = WorkerKey("prefill-0", "0" * 16)
TICKET = Ticket(b"t" * 16)
START = StartDecode("r", 1, pack_ids([1, 2]), SamplingParams(), [ChoiceState(0)], 10.0)
GRANT = Grant(TICKET, 1, 0, 2)
ARRIVED = BlocksArrived(PEER, TICKET, 1, (0,))


def frame(body: ToWorker, epoch: str = EPOCH, number: int = 1) -> FromRouter:
    return FromRouter(epoch, number, body)


def says(message: HandoffMessage) -> MessageArrived:
    return MessageArrived(PEER, message)


def taken(*items: Item) -> tuple[list[Item], list[Item]]:
    """(taken now, left waiting)."""
    waiting = deque(items)
    return list(take_now(waiting, EPOCH)), list(waiting)


@pytest.mark.parametrize("item", [frame(START), says(GRANT), ARRIVED])
def test_what_only_adds_is_taken_now(item: Item) -> None:
    assert taken(item) == ([item], [])


@pytest.mark.parametrize(
    "item",
    [
        frame(Abort("r", 1)),
        frame(ResetPrefixCache()),
        frame(Drain()),
        frame(Peers([])),
        frame(START, OTHER),
        says(Failed(TICKET, "internal_error", "x")),
        says(Renew([TICKET])),
        PeerUp(PEER, "shm"),
        PeerLost(PEER, "x"),
        Revoked(PEER, TICKET),
    ],
)
def test_what_may_touch_the_batch_waits_and_so_does_what_came_behind_it(item: Item) -> None:
    assert taken(item, frame(START), ARRIVED) == ([], [item, frame(START), ARRIVED])


def test_what_came_before_is_taken_in_order() -> None:
    abort, late = frame(Abort("q", 1), number=2), frame(START, number=3)
    assert taken(frame(START), ARRIVED, abort, late) == ([frame(START), ARRIVED], [abort, late])


def test_grant_overtakes_what_waits() -> None:
    abort = frame(Abort("r", 1))
    assert taken(abort, says(GRANT)) == ([says(GRANT)], [abort])


def test_first_frame_of_a_router_is_never_taken_within_a_step() -> None:
    waiting: deque[Item] = deque([frame(START)])
    assert list(take_now(waiting, None)) == []
    assert list(waiting) == [frame(START)]
