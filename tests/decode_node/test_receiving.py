"""Room for hand-offs in portions: nothing sooner than prefill reaches it, nobody starved, no two that wait for each
other."""

from __future__ import annotations

import random
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from penstock.core.ids import AttemptKey, SeededIds, Ticket, new_ticket
from penstock.decode_node.receiving import ReceivingQueue
from penstock.decode_node.scheduler import DecodeScheduler
from penstock.engine.block_pool import BlockPool
from penstock.engine.sequence import Sequence, blocks_for
from penstock.kvtransfer.effects import Offered
from penstock.kvtransfer.incoming import Granting
from penstock.protocol.sampling import SamplingParams
from penstock.worker.admission import publish_computed, release
from penstock.worker.role import Budget

IDS = SeededIds(5)


def sequence(num_tokens: int, arrival: float = 0.0, first: int = 1) -> Sequence:
    prompt = list(range(first, first + num_tokens))
    return Sequence(AttemptKey(f"r{arrival}", 1), 0, prompt, SamplingParams(max_tokens=64), b"k" * 32, arrival, 1e9)


def offer(num_tokens: int, reached: int, block_size: int = 4) -> Offered:
    return Offered(new_ticket(IDS), num_tokens, blocks_for(num_tokens, block_size), block_size, reached)


def enter(queue: ReceivingQueue, lead: Sequence, reached: int, block_size: int = 4) -> Ticket | None:
    """The ticket, when there was room."""
    offered = offer(lead.num_tokens, reached, block_size)
    queue.add(offered, lead)
    item = queue.offers.pop()
    assert queue.fits(item)
    return offered.ticket if queue.try_enter(item, reserve=0) else None


# ---- by hand ----


def test_offer_that_waits_holds_nothing_and_one_that_enters_what_is_reached() -> None:
    pool = BlockPool(8, 4)
    queue, lead = ReceivingQueue(pool), sequence(18)
    queue.add(offer(18, reached=2), lead)
    assert pool.num_free_blocks == 8
    queue.offers.clear()
    assert enter(queue, lead, reached=2)
    assert (pool.num_free_blocks, queue.num_owed_blocks) == (6, 3)
    assert queue.receiving[0].granting == Granting(0, 2, 0, tuple(lead.block_table))


def test_blocks_follow_as_prefill_advances() -> None:
    pool = BlockPool(8, 4)
    queue, lead = ReceivingQueue(pool), sequence(18)
    ticket = enter(queue, lead, reached=0)
    assert ticket is not None
    assert (pool.num_free_blocks, queue.receiving[0].stop) == (8, 0)
    for reached, free in ((1, 7), (1, 7), (4, 4), (5, 3)):
        queue.advance(ticket, reached)
        before = pool.num_free_blocks
        assert bool(queue.extend(reserve=0)) == (free < before)
        assert pool.num_free_blocks == free
        assert queue.receiving[0].granting == Granting(0, reached, 0, tuple(lead.block_table))
    assert queue.num_owed_blocks == 0


def test_what_is_owed_to_the_first_stays_out_of_reach_of_the_second() -> None:
    pool = BlockPool(8, 4)
    queue, first, second = ReceivingQueue(pool), sequence(24), sequence(16, 1.0, first=500)
    one = enter(queue, first, reached=2)
    assert one is not None
    assert enter(queue, second, reached=3) is None  # 6 are free, 4 of them are owed
    assert pool.num_free_blocks == 6
    two = enter(queue, second, reached=2)
    assert two is not None
    queue.advance(two, 4)
    assert queue.extend(reserve=0) == []
    queue.advance(one, 6)
    assert [item.lead for item in queue.extend(reserve=0)] == [first]
    assert (pool.num_free_blocks, len(second.block_table)) == (0, 2)
    queue.end(first)
    release(first, pool)
    assert [item.lead for item in queue.extend(reserve=0)] == [second]
    assert len(second.block_table) == 4


def test_reserve_for_running_sequences_stays_free() -> None:
    pool = BlockPool(4, 4)
    queue, lead = ReceivingQueue(pool), sequence(16)
    ticket = enter(queue, lead, reached=1)
    assert ticket is not None
    queue.advance(ticket, 4)
    queue.extend(reserve=2)
    assert (pool.num_free_blocks, queue.receiving[0].stop) == (2, 2)


def test_hand_off_that_is_cut_short_gets_nothing_more_and_is_owed_nothing() -> None:
    pool = BlockPool(8, 4)
    queue, lead = ReceivingQueue(pool), sequence(24)
    ticket = enter(queue, lead, reached=2)
    assert ticket is not None
    queue.revoke(ticket)
    queue.advance(ticket, 6)
    assert queue.extend(reserve=0) == []
    assert queue.num_owed_blocks == 0
    assert pool.num_free_blocks == 6  # no write may reach them before they are given back


def test_prefix_that_is_cached_here_is_held_and_never_granted() -> None:
    pool = BlockPool(8, 4)
    earlier = sequence(8)
    earlier.block_table = pool.allocate(2)
    earlier.num_computed_tokens = 8
    publish_computed(earlier, pool)
    queue, lead = ReceivingQueue(pool), sequence(14)
    assert enter(queue, lead, reached=1)
    assert lead.block_table == earlier.block_table
    assert queue.receiving[0].granting == Granting(2, 2, 2, tuple(earlier.block_table))
    assert (pool.num_free_blocks, lead.num_cached_tokens) == (6, 8)


@pytest.mark.parametrize(
    ("ours", "theirs", "num_cached", "held", "num_held"),
    [(4, 8, 8, 1, 2), (4, 8, 12, 1, 2), (4, 8, 4, 0, 0), (8, 4, 8, 2, 1), (8, 4, 16, 4, 2), (4, 6, 8, 0, 0)],
)
def test_held_blocks_end_where_the_sources_blocks_end_too(
    ours: int, theirs: int, num_cached: int, held: int, num_held: int
) -> None:
    """Nothing writes into a block that others may read."""
    pool = BlockPool(16, ours)
    earlier = sequence(num_cached)
    earlier.block_table = pool.allocate(num_cached // ours)
    earlier.num_computed_tokens = num_cached
    publish_computed(earlier, pool)
    queue, lead = ReceivingQueue(pool), sequence(23)
    assert enter(queue, lead, reached=0, block_size=theirs)
    granting = queue.receiving[0].granting
    assert (granting.held, granting.num_held) == (held, num_held)
    assert len(lead.block_table) == num_held


@pytest.mark.parametrize(("ours", "theirs"), [(4, 8), (8, 4), (16, 4), (4, 16), (16, 2), (6, 4), (4, 6)])
@pytest.mark.parametrize("num_tokens", [1, 4, 12, 15, 16, 17, 33])
def test_every_block_of_the_source_is_granted_in_the_end_whatever_the_two_sizes(
    ours: int, theirs: int, num_tokens: int
) -> None:
    pool = BlockPool(64, ours)
    queue, lead = ReceivingQueue(pool), sequence(num_tokens)
    ticket = enter(queue, lead, reached=0, block_size=theirs)
    assert ticket is not None
    num_blocks = blocks_for(num_tokens, theirs)
    for reached in range(1, num_blocks + 1):
        queue.advance(ticket, reached)
        queue.extend(reserve=0)
        item = queue.receiving[0]
        assert reached <= item.stop <= num_blocks
        assert len(lead.block_table) == blocks_for(min(reached * theirs, num_tokens), ours)
    assert item.stop == num_blocks


# ---- random histories ----


@dataclass
class Coming:
    """A prefill that feeds one hand-off."""

    offer: Offered
    lead: Sequence
    reached: int
    entered: bool = False
    stop: int = 0  # granted
    is_cut: bool = False


@dataclass
class History:
    """A tiny pool under random load: hand-offs that come in portions, local prompts, growth, preemption, aborts."""

    seed: int
    mixed_sizes: bool
    arrived: float = 0.0
    coming: dict[Ticket, Coming] = field(default_factory=dict)
    order: list[Ticket] = field(default_factory=list)  # in which offers came
    num_done: int = 0
    num_cut: int = 0
    num_portions: int = 0  # grants after the first

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.pool = BlockPool(self.rng.randint(6, 14), 4)
        self.scheduler = DecodeScheduler(self.pool, self.rng.randint(2, 5))
        self.longest = self.pool.num_blocks * 4

    def new_sequence(self) -> Sequence:
        """Prompts share prefixes; with its output each fits the pool alone, as the engine's door demands."""
        self.arrived += 1.0
        num_prompt = self.rng.randint(1, self.longest - 2)
        seq = sequence(num_prompt, self.arrived, first=self.rng.choice([1, 1, 500]))
        seq.params = SamplingParams(max_tokens=self.rng.randint(1, self.longest - num_prompt))
        return seq

    def arrive(self) -> None:
        seq = self.new_sequence()
        if self.rng.random() < 0.3:
            self.scheduler.add_waiting([seq])
            return
        size = self.rng.choice([2, 4, 8, 16, 6]) if self.mixed_sizes else 4
        offered = offer(seq.num_tokens, self.rng.randint(0, blocks_for(seq.num_tokens, size)), size)
        self.coming[offered.ticket] = Coming(offered, seq, offered.reached)
        self.order.append(offered.ticket)
        self.scheduler.add_offer(offered, seq)

    def advance(self) -> None:
        """Prefill computes on, whatever decode grants."""
        for item in self.coming.values():
            if self.rng.random() < 0.6:
                item.reached = min(item.reached + self.rng.randint(0, 2), item.offer.num_blocks)
                self.scheduler.incoming.advance(item.offer.ticket, item.reached)

    def cut(self) -> None:
        """Somebody gives up: before the grant it ends at once, after it the blocks come back later."""
        live = [ticket for ticket, item in self.coming.items() if not item.is_cut]
        if not live:
            return
        ticket = self.rng.choice(live)
        item, self.num_cut = self.coming[ticket], self.num_cut + 1
        if item.entered:
            item.is_cut = True
            self.scheduler.incoming.revoke(ticket)
        else:
            del self.coming[ticket]
            self.scheduler.forget_offer(ticket)

    def grant(self) -> None:
        for item, granting in self.scheduler.admit_offers():
            coming = self.coming[item.offer.ticket]
            assert granting is not None
            assert not coming.is_cut
            assert granting.stop > coming.stop or not coming.entered
            self.num_portions += coming.entered
            coming.entered, coming.stop = True, granting.stop
        self.check()
        self.check_owed()

    def complete(self) -> None:
        """All that was granted has come; a hand-off with everything joins, one that was cut lets go."""
        for ticket, item in list(self.coming.items()):
            if item.is_cut and self.rng.random() < 0.3:
                del self.coming[ticket]
                self.scheduler.end_receiving(item.lead)
                release(item.lead, self.pool)
            elif item.entered and not item.is_cut and item.stop == item.offer.num_blocks == item.reached:
                del self.coming[ticket]
                self.scheduler.end_receiving(item.lead)
                item.lead.num_computed_tokens = item.lead.num_tokens
                self.scheduler.join(item.lead)
                self.append(item.lead)

    def append(self, seq: Sequence) -> None:
        seq.output_ids.append(7)
        if len(seq.output_ids) == seq.params.max_tokens:
            self.scheduler.remove(seq)
            self.num_done += 1

    def step(self) -> None:
        for entry in self.scheduler.schedule(Budget(16, 64), 0.0):
            is_sampled = entry.sample
            if not self.scheduler.is_running(entry.seq):
                continue
            self.scheduler.advance(entry)
            if is_sampled:
                self.append(entry.seq)
        self.check()

    def check(self) -> None:
        """Block for block: who holds what, and that no prefill holds what it has not reached."""
        self.pool.check_invariants(self.scheduler.owners())
        self.scheduler.check_invariants()
        for item in self.scheduler.offers:
            assert item.lead.block_table == []
        for item in self.scheduler.receiving:
            reached = blocks_for(min(item.reached * item.offer.block_size, item.lead.num_tokens), 4)
            assert len(item.lead.block_table) <= max(item.num_held, reached), item
            assert item.stop * item.offer.block_size <= len(item.lead.block_table) * 4 or (
                item.stop == item.offer.num_blocks and len(item.lead.block_table) * 4 >= item.lead.num_tokens
            ), item

    def check_owed(self) -> None:
        """What the latest of those that just got something took, was not owed to an earlier one."""
        owed, before = 0, self._before
        for item in self.scheduler.receiving:
            got_something = len(item.lead.block_table) > before.get(item.offer.ticket, item.num_held)
            assert not got_something or self.pool.num_free_blocks >= owed, (owed, item)
            missing = blocks_for(item.lead.num_tokens, 4) - len(item.lead.block_table)
            owed += 0 if item.is_ending else missing

    def turn(self) -> None:
        self._before = {item.offer.ticket: len(item.lead.block_table) for item in self.scheduler.receiving}
        self.grant()
        self.complete()
        self.step()

    def is_idle(self) -> bool:
        return not (self.coming or self.scheduler.has_work())


def run_history(seed: int, mixed_sizes: bool) -> History:
    history = History(seed, mixed_sizes)
    for _ in range(history.rng.randint(5, 60)):
        if history.rng.random() < 0.4:
            history.arrive()
        if history.rng.random() < 0.05:
            history.cut()
        history.advance()
        history.turn()
    for _ in range(3000):
        if history.is_idle():
            break
        history.advance()
        history.turn()
    assert history.is_idle(), (seed, history.coming, history.scheduler.receiving)
    assert history.pool.num_free_blocks == history.pool.num_blocks, seed
    return history


def run_histories(count: int, mixed_sizes: bool) -> list[History]:
    return [run_history(seed, mixed_sizes) for seed in range(count)]


@pytest.mark.parametrize("mixed_sizes", [False, True])
def test_random_hand_offs_in_a_tiny_pool_all_end_and_nobody_waits_for_ever(mixed_sizes: bool) -> None:
    histories = run_histories(150, mixed_sizes)
    assert sum(history.num_done for history in histories) > 1000
    assert sum(history.num_portions for history in histories) > 200
    assert sum(history.num_cut for history in histories) > 50
    assert sum(history.scheduler.num_preemptions for history in histories) > 100


@pytest.mark.parametrize(
    ("name", "planted", "found"),
    [
        ("_missing", lambda queue, item: 0, "assert not got_something"),  # nothing is owed to anybody
        ("_blocks_below", lambda queue, item, stop: blocks_for(item.lead.num_tokens, 4), "max\\(item.num_held"),
    ],
)
def test_planted_mistake_is_found(
    name: str, planted: Callable[..., int], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReceivingQueue, name, planted)
    with pytest.raises(AssertionError) as caught:
        run_histories(150, mixed_sizes=False)
    assert re.search(found, "".join(traceback.format_exception(caught.value)))


def test_two_hand_offs_that_need_more_than_the_pool_together_both_end() -> None:
    """Each gets half, were it not for what is owed: then neither could ever get the rest."""
    history = History(0, mixed_sizes=False)
    history.pool = BlockPool(8, 4)
    history.scheduler = DecodeScheduler(history.pool, 4)
    for first in (1, 500):
        seq = sequence(24, float(first), first)
        seq.params = SamplingParams(max_tokens=2)
        offered = offer(24, 1)
        history.coming[offered.ticket] = Coming(offered, seq, 1)
        history.scheduler.add_offer(offered, seq)
    for reached in range(1, 7):
        for item in history.coming.values():
            item.reached = max(item.reached, reached)
            history.scheduler.incoming.advance(item.offer.ticket, item.reached)
        history.turn()
    for _ in range(10):
        history.turn()
    assert history.num_done == 2
