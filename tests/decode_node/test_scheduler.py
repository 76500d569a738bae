"""Admission, growth and preemption on the decode side."""

from __future__ import annotations

import pytest

from penstock.core.ids import AttemptKey, Ticket
from penstock.decode_node.scheduler import DecodeScheduler
from penstock.engine.block_pool import BlockPool
from penstock.engine.sequence import Sequence
from penstock.kvtransfer.effects import Offered
from penstock.kvtransfer.incoming import Granting
from penstock.protocol.sampling import SamplingParams
from penstock.worker.role import Budget

TICKET = Ticket(b"t" * 16)


def sequence(name: str, num_tokens: int, arrival: float, first: int = 1) -> Sequence:
    prompt = list(range(first, first + num_tokens))
    return Sequence(AttemptKey(name, 1), 0, prompt, SamplingParams(max_tokens=64), b"k" * 32, arrival, 1e9)


def step(scheduler: DecodeScheduler, tokens: int = 64) -> list[str]:
    """Run one step; every sampled sequence gets one more token. The names that ran."""
    entries = scheduler.schedule(Budget(tokens, 64), now=0.0)
    for entry in entries:
        sampled = entry.sample
        scheduler.advance(entry)
        if sampled:
            entry.seq.output_ids.append(7)
    return [entry.seq.key.request_id for entry in entries]


def test_schedule_long_prompt_is_chunked_under_the_budget() -> None:
    scheduler = DecodeScheduler(BlockPool(16, 4), max_running=4)
    seq = sequence("a", 10, 0.0)
    scheduler.add_waiting([seq])
    computed = []
    for _ in range(3):
        step(scheduler, tokens=4)
        computed.append(seq.num_computed_tokens)
    assert computed == [4, 8, 10]
    assert seq.output_ids == [7]


def test_schedule_decoding_sequences_go_before_a_prefill() -> None:
    scheduler = DecodeScheduler(BlockPool(32, 4), max_running=4)
    scheduler.add_waiting([sequence("short", 3, 0.0)])
    step(scheduler)
    scheduler.add_waiting([sequence("long", 40, 1.0, first=500)])
    assert step(scheduler, tokens=4) == ["short", "long"]
    assert step(scheduler, tokens=1) == ["short"]


def test_schedule_full_pool_preempts_the_youngest_and_loses_no_token() -> None:
    pool = BlockPool(6, 4)
    scheduler = DecodeScheduler(pool, max_running=4)
    old, young = sequence("old", 8, 0.0), sequence("young", 8, 1.0, first=100)
    scheduler.add_waiting([old, young])
    for _ in range(40):
        step(scheduler)
        pool.check_invariants(scheduler.owners())
        if len(old.output_ids) >= 12:
            scheduler.remove(old)
    assert scheduler.num_preemptions > 0
    assert len(old.output_ids) >= 12
    assert len(young.output_ids) > 8


def test_schedule_sequence_alone_in_a_full_pool_waits_and_goes_on() -> None:
    pool = BlockPool(3, 4)
    scheduler = DecodeScheduler(pool, max_running=4)
    held = pool.allocate(1)
    seq = sequence("a", 8, 0.0)
    scheduler.add_waiting([seq])
    step(scheduler)
    assert step(scheduler) == []
    pool.free(held)
    assert step(scheduler) == ["a"]


def test_admission_is_first_come_first_served_over_waiting_and_offers() -> None:
    scheduler = DecodeScheduler(BlockPool(8, 4), max_running=8)
    big, late = sequence("big", 30, 0.0), sequence("late", 4, 1.0, first=200)
    blocker = sequence("blocker", 12, -1.0, first=300)
    scheduler.add_waiting([blocker])
    step(scheduler)
    scheduler.add_waiting([big])
    scheduler.add_offer(Offered(TICKET, 4, 1, 4, 1), late)
    assert scheduler.admit_offers() == []
    assert step(scheduler) == ["blocker"]
    scheduler.remove(blocker)
    assert "big" in step(scheduler)


def test_offer_overtakes_sequences_that_wait_for_their_steps_when_all_have_room() -> None:
    scheduler = DecodeScheduler(BlockPool(32, 4), max_running=8)
    scheduler.add_waiting([sequence("first", 20, 0.0), sequence("second", 20, 1.0, first=100)])
    assert step(scheduler, tokens=4) == ["first"]
    lead = sequence("offered", 8, 2.0, first=300)
    scheduler.add_offer(Offered(TICKET, 8, 2, 4, 2), lead)
    [(item, granting)] = scheduler.admit_offers()
    assert (item.lead, granting) == (lead, Granting(0, 2, 0, tuple(lead.block_table)))


def test_offer_leaves_the_room_and_the_seats_of_those_that_came_before() -> None:
    for num_blocks, max_running, enters in ((14, 3, True), (13, 3, False), (14, 2, False)):
        scheduler = DecodeScheduler(BlockPool(num_blocks, 4), max_running=max_running)
        scheduler.add_waiting([sequence("first", 20, 0.0), sequence("second", 20, 1.0, first=100)])
        assert step(scheduler, tokens=4) == ["first"]
        # 5 blocks are in use, 1 is for growth; 5 and 1 more for "second", 2 for the offer
        scheduler.add_offer(Offered(TICKET, 8, 2, 4, 2), sequence("offered", 8, 2.0, first=300))
        assert bool(scheduler.admit_offers()) is enters
        for _ in range(6):
            step(scheduler, tokens=4)
        assert [seq.key.request_id for seq in scheduler.running][:2] == ["first", "second"]


def test_admit_offers_reuses_what_is_cached_here() -> None:
    scheduler = DecodeScheduler(BlockPool(16, 4), max_running=8)
    first = sequence("first", 12, 0.0)
    scheduler.add_waiting([first])
    step(scheduler)
    again = sequence("again", 12, 1.0)
    scheduler.add_offer(Offered(TICKET, 12, 3, 4, 1), again)
    [(item, granting)] = scheduler.admit_offers()
    assert item.lead is again
    assert granting == Granting(3, 3, 3, tuple(first.block_table[:3]))
    assert again.block_table == first.block_table[:3]


@pytest.mark.parametrize(("num_tokens", "num_blocks", "block_size"), [(11, 3, 4), (12, 4, 4), (12, 3, 8)])
def test_admit_offers_wrong_size_is_reported_not_granted(num_tokens: int, num_blocks: int, block_size: int) -> None:
    pool = BlockPool(16, 4)
    scheduler = DecodeScheduler(pool, max_running=8)
    scheduler.add_offer(Offered(TICKET, num_tokens, num_blocks, block_size, 3), sequence("a", 12, 0.0))
    [(_, granting)] = scheduler.admit_offers()
    assert granting is None
    assert (pool.num_free_blocks, scheduler.receiving) == (16, [])


def test_seats_are_bounded_by_max_running() -> None:
    scheduler = DecodeScheduler(BlockPool(32, 4), max_running=2)
    scheduler.add_waiting([sequence(name, 3, float(i), first=10 * i + 1) for i, name in enumerate("abc")])
    assert step(scheduler) == ["a", "b"]
