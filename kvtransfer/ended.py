"""What the destination remembers of tickets that are over: its last word, for a source that has not heard it."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.ids import Ticket, WorkerKey
from ..protocol.messages import Ack, Cancel


@dataclass(frozen=True, slots=True)
class Ended:
    peer: WorkerKey
    last_word: Ack | Cancel
    ended_at: float
    was_expected: bool  # the role has had its Received or ReceiveFailed


class EndedTickets:
    """The newest `limit` ended tickets."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ended: dict[Ticket, Ended] = {}

    def __len__(self) -> int:
        return len(self._ended)

    def get(self, ticket: Ticket) -> Ended | None:
        return self._ended.get(ticket)

    def add(self, ticket: Ticket, ended: Ended) -> None:
        self._ended.pop(ticket, None)
        self._ended[ticket] = ended
        while len(self._ended) > self._limit:
            del self._ended[next(iter(self._ended))]
