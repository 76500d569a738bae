"""I9: what comes late, twice or from nowhere is counted where someone can see it."""

from __future__ import annotations

from ..core.ids import Ticket
from ..kvtransfer.effects import LinkEvent, MessageArrived
from ..protocol.messages import Ack, AttemptFailed, Cancel, Done, FromWorker, Grant, Output
from ..router.core import RouterCore
from .invariants import InvariantBroken
from .journal import Journal
from .sim_worker import SimWorker


def num_stale(worker: SimWorker) -> int:
    return worker.source.stale + worker.destination.stale


def is_late(worker: SimWorker, event: LinkEvent) -> bool:
    """The message speaks of a ticket that does not live here, to the side of the hand-off that would know."""
    match event:
        case MessageArrived(message=Grant() | Ack() | Cancel() as message):
            return worker.hosts("prefill") and Ticket(message.ticket) not in worker.source.active()
        case MessageArrived(message=Done() as message):
            return worker.hosts("decode") and Ticket(message.ticket) not in worker.destination.active()
        case _:
            return False


def check_counted(worker: SimWorker, event: LinkEvent, stale_before: int) -> None:
    if num_stale(worker) == stale_before:
        kind = type(event.message).__name__ if isinstance(event, MessageArrived) else type(event).__name__
        raise InvariantBroken(f"I9 {worker.key}: a late {kind} was not counted")


def is_late_at_router(frame: FromWorker, journal: Journal) -> bool:
    """Everything in it is about requests that have ended."""
    match frame.body:
        case AttemptFailed(request_id=request_id):
            names = [request_id]
        case Output(items=items):
            names = [item.request_id for item in items]
        case _:
            return False
    return bool(names) and all(journal.is_over(name) for name in names)


def counted(router: RouterCore) -> int:
    return router.counters.stale_messages + router.counters.duplicate_tokens
