"""When to tell each peer which tickets are alive here. Shared by both hand-off tables; pure."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.ids import Ticket, WorkerKey
from ..protocol.messages import Renew
from .effects import SendMessage

MAX_TICKETS = 65536  # bound of one Renew on the wire


class Renewals:
    """One timer for each peer that shares a live ticket with us."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._due: dict[WorkerKey, float] = {}

    @property
    def next_due(self) -> float | None:
        return min(self._due.values(), default=None)

    def watch(self, peer: WorkerKey, now: float) -> None:
        """There is a live ticket with `peer` from now on."""
        self._due.setdefault(peer, now + self._interval_s)

    def run(self, live: Iterable[tuple[WorkerKey, Ticket]], now: float) -> list[SendMessage]:
        """A Renew for each peer that is due; peers without a live ticket are forgotten."""
        tickets: dict[WorkerKey, list[Ticket]] = {}
        for peer, ticket in live:
            tickets.setdefault(peer, []).append(ticket)
        self._due = {peer: due for peer, due in self._due.items() if peer in tickets}
        messages: list[SendMessage] = []
        for peer, due in self._due.items():
            if now >= due:
                self._due[peer] = now + self._interval_s
                messages += [SendMessage(peer, renew) for renew in _renews(tickets[peer])]
        return messages


def _renews(tickets: list[Ticket]) -> list[Renew]:
    return [Renew(tickets=list(tickets[at : at + MAX_TICKETS])) for at in range(0, len(tickets), MAX_TICKETS)]
