"""Room for what prefill hands over, in portions: blocks are given when KV is about to come, never sooner.

    offers     no blocks; prefill has begun         receiving  blocks for what prefill has reached, or for part of it

A hand-off that has entered is never starved by one that entered later: what the earlier ones still need stays out of
the later ones' reach, so two of them cannot hold half the pool each and wait for the other half.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..core.ids import BlockId, Ticket
from ..engine.block_pool import BlockPool
from ..engine.sequence import Sequence, blocks_for
from ..kvtransfer.effects import Offered
from ..kvtransfer.incoming import Granting
from ..worker.admission import match_blocks


@dataclass(slots=True, eq=False)
class Receiving:
    """One hand-off on its way into `lead`. `held`, `stop` and `reached` count the source's blocks, `num_held` ours."""

    offer: Offered
    lead: Sequence
    reached: int
    held: int = 0
    num_held: int = 0
    stop: int = 0
    is_ending: bool = False  # revoked; its blocks come back when no write can follow

    @property
    def granting(self) -> Granting:
        return Granting(self.held, self.stop, self.num_held, tuple(self.lead.block_table))


class ReceivingQueue:
    """The offers that wait and the hand-offs that receive, in the order in which they came in."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.offers: deque[Receiving] = deque()
        self.receiving: list[Receiving] = []

    # ---- entering and leaving ----

    def add(self, offer: Offered, lead: Sequence) -> None:
        self.offers.append(Receiving(offer, lead, offer.reached))

    def advance(self, ticket: Ticket, reached: int) -> None:
        """Prefill has come further."""
        for item in (*self.offers, *self.receiving):
            if item.offer.ticket == ticket:
                item.reached = reached

    def forget(self, ticket: Ticket) -> None:
        """An offer that ended before it was granted."""
        self.offers = deque(item for item in self.offers if item.offer.ticket != ticket)

    def revoke(self, ticket: Ticket) -> None:
        """A hand-off is cut short: it gets nothing more."""
        for item in self.receiving:
            if item.offer.ticket == ticket:
                item.is_ending = True

    def end(self, lead: Sequence) -> None:
        """The hand-off lets go of `lead`, whose blocks stay with it."""
        self.receiving = [item for item in self.receiving if item.lead is not lead]

    # ---- giving room ----

    @property
    def num_owed_blocks(self) -> int:
        """Blocks that what is receiving will still need."""
        return sum(self._missing(item) for item in self.receiving if not item.is_ending)

    def extend(self, reserve: int) -> list[Receiving]:
        """More blocks for those that have come further, as far as the pool goes; the ones that got some."""
        extended: list[Receiving] = []
        owed = 0
        for item in (item for item in self.receiving if not item.is_ending):
            wanted = self._blocks_below(item, item.reached) - len(item.lead.block_table)
            room = min(wanted, self._pool.num_free_blocks - owed - reserve)
            if room > 0:
                item.lead.block_table += self._pool.allocate(room)
                before, item.stop = item.stop, self._covered(item)
                extended += [item] if item.stop > before else []
            owed += self._missing(item)
        return extended

    def fits(self, item: Receiving) -> bool:
        """The offer speaks of the sequence that is expected."""
        offer = item.offer
        return (offer.num_tokens, offer.num_blocks) == (
            item.lead.num_tokens,
            blocks_for(item.lead.num_tokens, offer.block_size),
        )

    def try_enter(self, item: Receiving, reserve: int) -> bool:
        """Give the next offer what its prefill has reached, beside all that is owed; False when there is no room."""
        pool, lead = self._pool, item.lead
        held = self._held(item)
        fresh = self._blocks_below(item, item.reached) - len(held)
        pool.acquire(held)
        if not pool.can_allocate(max(fresh, 0) + reserve + self.num_owed_blocks):
            pool.free(held)
            return False
        lead.block_table = held + (pool.allocate(fresh) if fresh > 0 else [])
        lead.num_cached_tokens = lead.num_computed_tokens = len(held) * pool.block_size
        lead.num_published_blocks = item.num_held = len(held)
        item.held = lead.num_cached_tokens // item.offer.block_size
        item.stop = max(item.held, self._covered(item))
        self.receiving.append(item)
        return True

    # ---- arithmetic between two block sizes ----

    def _held(self, item: Receiving) -> list[BlockId]:
        """Leading blocks that are here, up to where the source's blocks end too: nothing writes into a shared one."""
        held, size = match_blocks(item.lead, self._pool, keep_last=False), self._pool.block_size
        while held and len(held) * size % item.offer.block_size:
            held.pop()
        return held

    def _blocks_below(self, item: Receiving, stop: int) -> int:
        """Our blocks that hold the source's ordinals below `stop`."""
        return blocks_for(min(stop * item.offer.block_size, item.offer.num_tokens), self._pool.block_size)

    def _covered(self, item: Receiving) -> int:
        """The source's ordinals that our blocks hold wholly."""
        num_tokens = len(item.lead.block_table) * self._pool.block_size
        if num_tokens >= item.offer.num_tokens:
            return item.offer.num_blocks
        return num_tokens // item.offer.block_size

    def _missing(self, item: Receiving) -> int:
        return self._blocks_below(item, item.offer.num_blocks) - len(item.lead.block_table)
