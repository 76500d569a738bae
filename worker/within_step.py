"""What a worker may handle while a step computes, so that a hand-off does not wait for the end of each step on its way.

A step holds the sequences of its batch: their tables, tokens and blocks must stay as they are. So only what adds work
is taken, or concerns a hand-off that is under way, whose sequence is in no batch: a Start, an Offer, blocks that have
come, Done. All of it in the order of arrival, behind which nothing else is overtaken: an Abort or a lost link waits for
the end of the step, and what came behind it waits too. A Grant may overtake, it only lets a source send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ..kvtransfer.effects import BlocksArrived, LinkEvent, MessageArrived
from ..protocol.messages import Done, FromRouter, Grant, Offer, Reached, StartDecode, StartPrefill

Item = FromRouter | LinkEvent


def is_grant(item: Item) -> bool:
    return isinstance(item, MessageArrived) and isinstance(item.message, Grant)


def only_adds(item: Item, router_epoch: str | None) -> bool:
    """Nothing that is being computed changes by it. A frame of a new router voids what runs, so it never does."""
    match item:
        case FromRouter(router_epoch=epoch, body=StartDecode() | StartPrefill()):
            return epoch == router_epoch
        case MessageArrived(message=Offer() | Reached() | Done()) | BlocksArrived():
            return True
        case _:
            return False


def take_now(waiting: deque[Item], router_epoch: str | None) -> Iterator[Item]:
    """Take out of `waiting`, one after the other, what may be handled within the step."""
    is_in_order = True
    for item in list(waiting):
        if is_grant(item) or (is_in_order and only_adds(item, router_epoch)):
            waiting.remove(item)
            yield item
        else:
            is_in_order = False
