"""Offers that are here before the router's StartDecode. Bounded in number and in time."""

from __future__ import annotations

import msgspec

from ..core.ids import Ticket, WorkerKey
from ..protocol.messages import Offer


class EarlyOffers:
    """At most `limit` offers, each for `keep_s`; keyed by peer too, so that nobody can take another's place."""

    def __init__(self, limit: int, keep_s: float) -> None:
        self._limit, self._keep_s = limit, keep_s
        self._offers: dict[tuple[WorkerKey, Ticket], tuple[Offer, float]] = {}

    def __len__(self) -> int:
        return len(self._offers)

    @property
    def next_deadline(self) -> float | None:
        return min((until for _, until in self._offers.values()), default=None)

    def add(self, peer: WorkerKey, offer: Offer, now: float) -> list[tuple[WorkerKey, Ticket]]:
        """Keep an offer; the oldest ones that give way for it."""
        self._offers.setdefault((peer, Ticket(offer.ticket)), (offer, now + self._keep_s))
        dropped: list[tuple[WorkerKey, Ticket]] = []
        while len(self._offers) > self._limit:
            key = next(iter(self._offers))
            del self._offers[key]
            dropped.append(key)
        return dropped

    def advance(self, peer: WorkerKey, ticket: Ticket, reached: int) -> bool:
        """The source has come further meanwhile; False when no offer of it is kept."""
        offer, until = self._offers.get((peer, ticket), (None, 0.0))
        if offer is not None and offer.reached < reached <= offer.num_blocks:
            self._offers[peer, ticket] = (msgspec.structs.replace(offer, reached=reached), until)
        return offer is not None

    def take(self, peer: WorkerKey, ticket: Ticket) -> Offer | None:
        found = self._offers.pop((peer, ticket), None)
        return None if found is None else found[0]

    def forget_peer(self, peer: WorkerKey) -> None:
        self._offers = {key: value for key, value in self._offers.items() if key[0] != peer}

    def expired(self, now: float) -> list[tuple[WorkerKey, Ticket]]:
        """Remove and name the offers nobody has asked for in time."""
        gone = [key for key, (_, until) in self._offers.items() if now >= until]
        for key in gone:
            del self._offers[key]
        return gone
