"""Who runs in the next decode step:

admission, growth, preemption. Owns the blocks of every sequence on the decode side.
"""

from __future__ import annotations

from bisect import insort, insort_left
from collections import deque
from operator import attrgetter

from ..core.ids import BlockId, Ticket
from ..engine.block_pool import BlockPool
from ..engine.interface import ScheduledSeq
from ..engine.sequence import Sequence, blocks_for
from ..kvtransfer.effects import Offered
from ..kvtransfer.incoming import Granting
from ..worker.admission import next_chunk, publish_computed, release, try_admit, try_grow
from ..worker.role import Budget
from .drafting import Drafting
from .preemption import Preemption
from .receiving import Receiving, ReceivingQueue

Admitted = tuple[Receiving, Granting | None]
_arrival = attrgetter("arrival")


class DecodeScheduler:
    """Continuous batching, oldest first. What needs only room overtakes what needs steps, if there is room for both.

    waiting    no blocks, perhaps parked ones; by arrival              offers     no blocks; prefill is about to push
    running    blocks for all their tokens; by arrival                 receiving  blocks granted to a hand-off

    A sequence is in one of the four. Admission leaves one free block for each running sequence, so that admitting
    does not cause preemption at once.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_running: int,
        preemption: Preemption | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        self._pool, self._max_running = pool, max_running
        self.preemption = preemption or Preemption(pool)
        self.drafting = drafting or Drafting(pool, None)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.incoming = ReceivingQueue(pool)
        self.queried_tokens = 0
        self.hit_tokens = 0

    @property
    def offers(self) -> deque[Receiving]:
        return self.incoming.offers

    @property
    def receiving(self) -> list[Receiving]:
        return self.incoming.receiving

    @property
    def num_preemptions(self) -> int:
        return self.preemption.num_preempted

    # ---- entering and leaving ----

    def add_waiting(self, seqs: list[Sequence]) -> None:
        self.waiting.extend(seqs)

    def add_forks(self, seqs: list[Sequence]) -> None:
        """Choices that share a prompt now cached: they go before everything that arrived later."""
        for seq in reversed(seqs):
            self._insert_waiting(seq)

    def add_offer(self, offer: Offered, lead: Sequence) -> None:
        self.incoming.add(offer, lead)

    def forget_offer(self, ticket: Ticket) -> None:
        self.incoming.forget(ticket)

    def end_receiving(self, lead: Sequence) -> None:
        """The hand-off lets go of `lead`, whose blocks stay with it."""
        self.incoming.end(lead)

    def join(self, seq: Sequence) -> None:
        """Run `seq`, whose cache is complete."""
        publish_computed(seq, self._pool)
        self._insert_running(seq)

    def remove(self, seq: Sequence) -> None:
        """Take `seq` out wherever it is and free its blocks."""
        if seq in self.running:
            self.running.remove(seq)
        if seq in self.waiting:
            self.waiting.remove(seq)
        self.preemption.drop(seq)
        self.drafting.forget(seq)
        release(seq, self._pool)

    def _insert_waiting(self, seq: Sequence) -> None:
        """Before all that arrived with it or later."""
        insort_left(self.waiting, seq, key=_arrival)

    def _insert_running(self, seq: Sequence) -> None:
        """Behind all that arrived with it or earlier."""
        insort(self.running, seq, key=_arrival)

    # ---- admission ----

    @property
    def _occupied(self) -> int:
        return len(self.running) + len(self.receiving)

    def _has_seat(self) -> bool:
        return self._occupied < self._max_running

    def admit_offers(self) -> list[Admitted]:
        """Hand-offs that get blocks now, or more of them (None: the offer does not fit its sequence)."""
        admitted: list[Admitted] = [(item, item.granting) for item in self.incoming.extend(len(self.running))]
        while self.offers:
            item = self.offers[0]
            fits = self.incoming.fits(item)
            if fits and not self._try_enter(item):
                break
            self.offers.popleft()
            admitted.append((item, item.granting if fits else None))
            if fits:
                self._count_lookup(item.lead)
        return admitted

    def _try_enter(self, item: Receiving) -> bool:
        """Give an offer room beside all that came before it. Sequences that wait to be computed here may have to wait
        for several steps; a hand-off computes nothing here and need not, when there is room for both.
        """
        older = [seq for seq in self.waiting if seq.arrival < item.lead.arrival]
        if self._occupied + len(older) >= self._max_running:
            return False
        ahead = sum(blocks_for(seq.num_tokens, self._pool.block_size) + 1 for seq in older)
        return self.incoming.try_enter(item, reserve=len(self.running) + ahead)

    def _admit_waiting(self) -> Sequence | None:
        if not self.waiting or not self._has_seat():
            return None
        if self.offers and self.offers[0].lead.arrival < self.waiting[0].arrival:
            return None
        if not self._try_admit(self.waiting[0]):
            return None
        seq = self.waiting.popleft()
        self.preemption.come_back(seq)
        self._insert_running(seq)
        return seq

    def _try_admit(self, seq: Sequence) -> bool:
        reserve = len(self.running) + self.incoming.num_owed_blocks
        if try_admit(seq, self._pool, reserve=reserve) is None:
            return False
        self._count_lookup(seq)
        return True

    def _count_lookup(self, seq: Sequence) -> None:
        self.queried_tokens += seq.num_tokens
        self.hit_tokens += seq.num_cached_tokens

    # ---- a step ----

    def schedule(self, budget: Budget, now: float) -> list[ScheduledSeq]:
        """Running sequences first (one token each, and what is drafted behind it), then the chunks of those that still
        prefill, then new ones.
        """
        self._make_room(now)
        decoding = [s for s in self.running if not s.is_prefilling]
        prefilling = [s for s in self.running if s.is_prefilling]
        entries = self.drafting.extend(_chunks(decoding, budget, now), budget, self._num_spare_blocks)
        entries += _chunks(prefilling, budget, now)
        while budget.num_tokens > 0 and budget.num_seqs > 0 and (seq := self._admit_waiting()) is not None:
            entries += _chunks([seq], budget, now)
        return entries

    @property
    def _num_spare_blocks(self) -> int:
        """Free blocks that nothing waits for, and no running sequence enters soon."""
        if self.waiting or self.offers:
            return 0
        return self._pool.num_free_blocks - len(self.running) - self.incoming.num_owed_blocks

    def _make_room(self, now: float) -> None:
        """Every running sequence gets a block for its newest token; the youngest give way when there are none."""
        position = 0
        while position < len(self.running):
            if try_grow(self.running[position], self._pool):
                position += 1
            else:
                seq = self.running.pop()
                self.preemption.leave(seq, now)
                self._insert_waiting(seq)

    def is_running(self, seq: Sequence) -> bool:
        """`seq` has not left since it was scheduled."""
        return seq in self.running

    def advance(self, entry: ScheduledSeq, num_accepted: int = 0) -> None:
        """Count the entry's tokens as computed, and of its draft the first so many, which `seq` has by now."""
        entry.seq.num_computed_tokens += entry.num_new_tokens + num_accepted
        self.drafting.settle(entry, num_accepted)
        publish_computed(entry.seq, self._pool)

    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.offers)

    def owners(self) -> list[list[BlockId]]:
        owners = [*self.running, *(item.lead for item in self.receiving)]
        return [seq.block_table for seq in owners if seq.block_table]

    def check_invariants(self) -> None:
        """Raise AssertionError unless each list is in order and parked bytes belong to waiting sequences alone."""
        for name, seqs in (("waiting", list(self.waiting)), ("running", self.running)):
            arrivals = [seq.arrival for seq in seqs]
            assert arrivals == sorted(arrivals), f"{name} sequences stand in the order {arrivals}"
        holding = [seq.key for seq in self.waiting if seq.block_table]
        assert not holding, f"waiting sequences {holding} hold blocks"
        self.preemption.check_invariants(self.waiting, [*self.running, *(item.lead for item in self.receiving)])


def _chunks(seqs: list[Sequence], budget: Budget, now: float) -> list[ScheduledSeq]:
    """The next pieces of these sequences, as far as the budget goes."""
    return [entry for seq in seqs if (entry := next_chunk(seq, budget, now)) is not None]
