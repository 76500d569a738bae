"""What a worker may handle while a step computes, so that a hand-off does not wait for the end of each step on its way.

A step holds the sequences of its batch: their tables, tokens and blocks must stay as they are until it ends. Whatever
concerns other sequences (those that wait, receive, or are handed over) is handled at once. What would end one of the
batch is left for later, and may be overtaken, but not by a start on a worker that is full: that one waits for the place
of what ends. Behind what would end anything at all, nothing is handled any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum

from ..core.ids import AttemptKey
from ..kvtransfer.effects import BlocksArrived, LinkEvent, MessageArrived, PeerLost, PeerUp, Revoked
from ..protocol.messages import Abort, Cancel, FromRouter, Peers, StartDecode, StartPrefill, Welcome
from .routers import RouterGone

Item = FromRouter | LinkEvent | RouterGone


class Moment(Enum):
    """When to handle an item that arrives within a step."""

    NOW = "it leaves the batch alone"
    LATER = "it may end a sequence of the batch; what comes behind it does not depend on it"
    STOP = "it may end all there is, and what comes behind it depends on that"


def moment_of(item: Item, epochs: Mapping[str, str], computing: set[AttemptKey], has_prefill: bool) -> Moment:
    """`computing`: the attempts of the batch. `has_prefill`: sequences of the batch may be on their way to a peer."""
    match item:
        case FromRouter(router_epoch=epoch, router=router):
            # The first frame of another incarnation voids all that the one before has asked for.
            return _moment_of_command(item, computing) if epochs.get(router) == epoch else Moment.STOP
        case MessageArrived(message=Cancel()):
            return Moment.LATER
        case MessageArrived() | BlocksArrived() | Revoked() | PeerUp():
            return Moment.NOW
        case PeerLost():
            return Moment.STOP if has_prefill else Moment.NOW
        case _:
            return Moment.STOP


def _moment_of_command(frame: FromRouter, computing: set[AttemptKey]) -> Moment:
    match frame.body:
        case StartDecode() | StartPrefill() | Peers() | Welcome():
            return Moment.NOW
        case Abort(request_id=request_id, attempt=attempt):
            return Moment.LATER if AttemptKey(request_id, attempt, frame.router) in computing else Moment.NOW
        case _:
            return Moment.LATER


def take_now(
    waiting: deque[Item],
    epochs: Mapping[str, str],
    computing: set[AttemptKey],
    has_prefill: bool,
    is_full: Callable[[], bool],
) -> Iterator[Item]:
    """Take out of `waiting`, one after the other, what may be handled within the step.

    `epochs`: of the routers that it serves.
    `is_full`: the worker would refuse one more attempt now. It may not once it has handled what waits for later.
    """
    for item in list(waiting):
        moment = moment_of(item, epochs, computing, has_prefill)
        if moment is Moment.STOP:
            return
        if moment is Moment.NOW and not (_is_start(item) and is_full()):
            waiting.remove(item)
            yield item


def _is_start(item: Item) -> bool:
    return isinstance(item, FromRouter) and isinstance(item.body, StartDecode | StartPrefill)
