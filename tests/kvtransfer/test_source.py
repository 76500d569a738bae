"""The prefill side alone, call by call. Layer-wise pushes are in test_layer_pushes.py."""

from __future__ import annotations

import random

import pytest

from penstock.core.errors import InternalError
from penstock.core.ids import BlockId, SeededIds, WorkerKey, new_ticket
from penstock.kvtransfer.effects import Renewing, SendBlocks, SendMessage, SourceEffect, SourceEnded, Withdraw
from penstock.kvtransfer.source import HandoffPlan, PushSizes, SourceTable
from penstock.protocol.messages import Ack, Cancel, Done, Failed, Grant, Offer, Phases, Reached, Renew

DECODE, OTHER = WorkerKey("decode-0", "d" * 16), WorkerKey("decode-1", "e" * 16)
IDS = SeededIds(1)
TICKET = new_ticket(IDS)
BLOCKS = [BlockId(n) for n in (7, 3, 9, 4)]
NUM_LAYERS = 3
SIZES = PushSizes(NUM_LAYERS, most=64, least=1000)
PROOF = b"p" * 16


def plan(num_tokens: int = 15, num_blocks: int = 4, reached: int = 4) -> HandoffPlan:
    return HandoffPlan(num_tokens, num_blocks, 4, reached, PROOF)


def table_with_offer(reached: int = 4) -> SourceTable:
    table = SourceTable(9.0, 2.0, SIZES)
    offer = Offer(ticket=TICKET, num_tokens=15, num_blocks=4, block_size=4, reached=reached, proof=PROOF)
    assert table.open(TICKET, DECODE, plan(reached=reached), 0.0) == [
        Renewing(DECODE, TICKET, is_alive=True),
        SendMessage(DECODE, offer),
    ]
    return table


def grant(held: int = 0, stop: int = 4, generation: int = 5) -> Grant:
    return Grant(ticket=TICKET, generation=generation, held=held, stop=stop)


def pushed(ordinals: tuple[int, ...], generation: int = 5) -> SendBlocks:
    """All layers of these blocks."""
    blocks = tuple(BLOCKS[ordinal] for ordinal in ordinals)
    return SendBlocks(DECODE, TICKET, generation, ordinals, blocks, 0, NUM_LAYERS)


def seal(table: SourceTable, now: float = 1.0) -> list[SourceEffect]:
    return table.seal(TICKET, BLOCKS, (), Phases(), now)


def ended(code: str = "", message: str = "") -> list[SourceEffect]:
    """What an end asks for: nothing leaves any more, no renewal, the blocks are the role's."""
    return [Withdraw(DECODE, TICKET), Renewing(DECODE, TICKET, is_alive=False), SourceEnded(TICKET, code, message)]


def test_blocks_ready_before_grant_waits_and_goes_in_one_push() -> None:
    table = table_with_offer()
    assert table.blocks_ready(TICKET, BLOCKS[:2], 0.1) == []
    assert table.blocks_ready(TICKET, BLOCKS[:3], 0.2) == []
    assert table.on_message(DECODE, grant(), 0.3) == [pushed((0, 1, 2))]
    table.check_invariants()


def test_seal_pushes_the_rest_and_done_and_ack_ends_it() -> None:
    table = table_with_offer()
    table.on_message(DECODE, grant(held=1), 0.1)
    assert table.blocks_ready(TICKET, BLOCKS[:2], 0.2) == [pushed((1,))]
    push, done = seal(table)
    assert push == pushed((2, 3))
    assert done == SendMessage(
        DECODE, Done(ticket=TICKET, generation=5, num_blocks=3, num_tokens=15, first_tokens=(), phases=Phases())
    )
    assert table.on_message(DECODE, Ack(ticket=TICKET, generation=5), 0.4) == ended()
    assert table.active() == []
    assert table.next_deadline is None
    assert table.stale == 0


def test_grant_of_everything_held_sends_done_only() -> None:
    table = table_with_offer()
    assert seal(table) == []
    (effect,) = table.on_message(DECODE, grant(held=4), 1.5)
    assert isinstance(effect, SendMessage)
    assert isinstance(effect.message, Done)
    assert effect.message.num_blocks == 0


def test_push_is_split_at_the_bound() -> None:
    table = SourceTable(9.0, 2.0, PushSizes(NUM_LAYERS, most=2 * NUM_LAYERS, least=1000))
    blocks = [BlockId(n) for n in range(5)]
    table.open(TICKET, DECODE, plan(17, 5), 0.0)
    table.blocks_ready(TICKET, blocks, 0.1)
    pushes = table.on_message(DECODE, grant(stop=5), 0.2)
    assert [push.ordinals for push in pushes if isinstance(push, SendBlocks)] == [(0, 1), (2, 3), (4,)]


def test_grant_twice_changes_nothing() -> None:
    table = table_with_offer()
    table.blocks_ready(TICKET, BLOCKS, 0.1)
    assert len(table.on_message(DECODE, grant(), 0.2)) == 1
    assert table.on_message(DECODE, grant(), 0.3) == []
    assert table.stale == 0


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (OTHER, grant()),
        (DECODE, grant(held=5, stop=5)),
        (DECODE, grant(held=2, stop=1)),
        (DECODE, grant(stop=5)),
        (DECODE, Grant(ticket=b"?" * 16, generation=1, held=0, stop=4)),
        (DECODE, Ack(ticket=TICKET, generation=5)),
        (OTHER, Cancel(ticket=TICKET, code="cancelled", message="")),
        (DECODE, Offer(ticket=TICKET, num_tokens=1, num_blocks=1, block_size=4, reached=1)),
        (DECODE, Reached(ticket=TICKET, reached=1)),
    ],
)
def test_message_that_does_not_fit_is_counted_and_ignored(peer: WorkerKey, message: object) -> None:
    """Bug list 15: a late or strange message is a counter, never an end."""
    table = table_with_offer()
    assert table.on_message(peer, message, 0.5) == []  # type: ignore[arg-type]
    assert table.stale == 1
    assert table.active() == [TICKET]
    table.check_invariants()


@pytest.mark.parametrize("other", [grant(generation=6), grant(held=1)])
def test_grant_of_another_generation_or_start_after_a_grant_is_stale(other: Grant) -> None:
    table = table_with_offer()
    table.on_message(DECODE, grant(), 0.1)
    assert table.on_message(DECODE, other, 0.2) == []
    assert table.stale == 1


def test_open_twice_is_refused() -> None:
    """Bug list 18: a ticket names one hand-off."""
    table = table_with_offer()
    with pytest.raises(InternalError, match="used once"):
        table.open(TICKET, DECODE, plan(), 0.1)


def test_seal_with_other_counts_is_refused() -> None:
    table = table_with_offer()
    with pytest.raises(InternalError, match="3 blocks; offered 4"):
        table.seal(TICKET, BLOCKS[:3], (), Phases(), 0.1)
    with pytest.raises(InternalError, match="from 0 to 4"):
        table.blocks_ready(TICKET, [*BLOCKS, BlockId(1)], 0.1)
    seal(table)
    with pytest.raises(InternalError, match="once"):
        seal(table)
    with pytest.raises(InternalError, match="from 4 to 4"):
        table.blocks_ready(TICKET, BLOCKS[:2], 0.2)


def test_offer_unanswered_ends_and_tells_the_peer() -> None:
    table = table_with_offer()
    assert table.next_deadline == 2.0
    failed, *end = table.tick(2.0)
    assert isinstance(failed, SendMessage)
    assert isinstance(failed.message, Failed)
    assert end == ended("transfer_failed", failed.message.message)


def test_renew_keeps_a_queued_offer_alive_and_its_end_is_the_lease() -> None:
    table = table_with_offer()
    for now in range(1, 30):
        table.on_message(DECODE, Renew(tickets=[TICKET]), float(now))
        assert [type(e.message) for e in table.tick(float(now)) if isinstance(e, SendMessage)] in ([], [Reached])
    assert [e for e in table.tick(29 + 8.9) if isinstance(e, SourceEnded)] == []
    assert [e.code for e in table.tick(29 + 9.0) if isinstance(e, SourceEnded)] == ["lease_expired"]


def test_grant_renews_too_and_a_renewal_of_another_peer_does_not() -> None:
    table = table_with_offer()
    table.on_message(DECODE, grant(), 5.0)
    table.on_message(OTHER, Renew(tickets=[TICKET]), 13.0)
    assert [e for e in table.tick(13.9) if isinstance(e, SourceEnded)] == []
    assert [e.code for e in table.tick(14.0) if isinstance(e, SourceEnded)] == ["lease_expired"]


def test_ticket_is_named_alive_from_its_offer_to_its_end() -> None:
    """The link's own thread renews it: the table only says for how long."""
    table = table_with_offer()
    table.on_message(DECODE, grant(), 0.1)
    for now in (1.0, 4.0, 7.0):
        assert not any(isinstance(effect, Renewing) for effect in table.tick(now))
    assert Renewing(DECODE, TICKET, is_alive=False) in table.fail(TICKET, "cancelled", "", 7.5)


def test_done_is_repeated_until_it_is_answered() -> None:
    """Bug list 17: the destination never counts to a number that it has not heard."""
    table = table_with_offer()
    table.on_message(DECODE, grant(), 0.1)
    done = seal(table, 0.2)[-1]
    table.on_message(DECODE, Renew(tickets=[TICKET]), 3.0)
    assert table.tick(3.1) == []
    assert table.tick(3.2) == [done]
    assert table.tick(6.1) == []
    assert table.tick(6.2) == [done]


def test_reached_is_said_when_a_chunk_begins_and_only_when_it_is_news() -> None:
    table = table_with_offer(reached=1)
    assert table.reach(TICKET, 1, 0.1) == []
    assert table.reach(TICKET, 3, 0.2) == [SendMessage(DECODE, Reached(ticket=TICKET, reached=3))]
    assert table.reach(TICKET, 2, 0.3) == []
    assert table.reach(TICKET, 9, 0.4) == [SendMessage(DECODE, Reached(ticket=TICKET, reached=4))]
    assert table.reach(new_ticket(IDS), 9, 0.4) == []


def test_reached_is_repeated_while_a_grant_is_missing() -> None:
    """A lost Reached would leave both sides waiting for the other."""
    table = table_with_offer(reached=1)
    table.on_message(DECODE, grant(stop=1), 0.1)
    table.reach(TICKET, 3, 0.2)
    table.blocks_ready(TICKET, BLOCKS[:3], 0.3)
    reached = SendMessage(DECODE, Reached(ticket=TICKET, reached=3))
    assert table.tick(3.1) == []
    assert table.tick(3.2) == [reached]
    assert table.next_deadline == pytest.approx(6.2)
    assert table.on_message(DECODE, grant(stop=3), 3.3) == [pushed((1, 2))]
    assert table.tick(6.4) == []


def test_offer_is_not_repeated_before_the_destination_has_shown_itself() -> None:
    table = table_with_offer()
    assert table.tick(1.9) == []


# ---- grants in portions ----


def test_portions_leave_as_they_are_granted_and_done_waits_for_the_last() -> None:
    table = table_with_offer()
    assert seal(table, 0.1) == []
    assert table.on_message(DECODE, grant(held=1, stop=1), 0.2) == []
    assert table.on_message(DECODE, grant(held=1, stop=2), 0.3) == [pushed((1,))]
    assert table.on_message(DECODE, grant(held=1, stop=2), 0.4) == []
    table.check_invariants()
    push, done = table.on_message(DECODE, grant(held=1, stop=4), 0.5)
    assert push == pushed((2, 3))
    assert isinstance(done, SendMessage)
    assert isinstance(done.message, Done)
    assert done.message.num_blocks == 3
    assert table.stale == 0


def test_older_portion_that_comes_late_changes_nothing() -> None:
    table = table_with_offer()
    table.on_message(DECODE, grant(stop=3), 0.1)
    assert table.on_message(DECODE, grant(stop=1), 0.2) == []
    assert table.blocks_ready(TICKET, BLOCKS, 0.3) == [pushed((0, 1, 2))]
    assert table.stale == 0


def test_each_block_is_pushed_once_and_in_order_over_random_histories() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        num_blocks = rng.randint(1, 9)
        blocks = [BlockId(n) for n in rng.sample(range(50), num_blocks)]
        most = rng.choice([1, 2, 3, 7, 64])
        table = SourceTable(9.0, 2.0, PushSizes(NUM_LAYERS, most, least=1000))
        table.open(TICKET, DECODE, plan(4 * num_blocks, num_blocks, 0), 0.0)
        held = rng.randint(0, num_blocks)
        ready, stop, is_sealed = 0, held, False
        effects: list[SourceEffect] = []
        while not (is_sealed and stop == num_blocks):
            if rng.random() < 0.5 and not is_sealed:
                ready = rng.randint(ready, num_blocks)
                is_sealed = ready == num_blocks
                calls = table.seal(TICKET, blocks, (), Phases(), 0.1) if is_sealed else []
                effects += calls or table.blocks_ready(TICKET, blocks[:ready], 0.1)
            else:
                stop = rng.randint(stop, num_blocks)
                effects += table.on_message(DECODE, grant(held, stop), 0.1)
            table.check_invariants()
        effects += table.on_message(DECODE, grant(held, stop), 0.1)
        *pushes, done = effects
        layers: dict[int, list[int]] = {ordinal: [] for ordinal in range(held, num_blocks)}
        for push in pushes:
            assert isinstance(push, SendBlocks)
            assert len(push.ordinals) * push.num_layers <= most
            assert [blocks[ordinal] for ordinal in push.ordinals] == list(push.block_ids)
            for ordinal in push.ordinals:
                layers[ordinal] += range(push.first_layer, push.first_layer + push.num_layers)
        assert all(found == list(range(NUM_LAYERS)) for found in layers.values()), seed
        assert isinstance(done, SendMessage)
        assert isinstance(done.message, Done)
        assert done.message.num_blocks == num_blocks - held


# ---- the end ----


def test_peer_lost_ends_only_its_tickets() -> None:
    table = table_with_offer()
    second = new_ticket(IDS)
    table.open(second, OTHER, plan(4, 1, 1), 0.0)
    assert table.peer_lost(DECODE, 1.0) == ended("node_lost", f"lost the link to {DECODE}")
    assert table.active() == [second]
    assert table.peer_lost(DECODE, 1.0) == []


@pytest.mark.parametrize("first", ["expire", "abort"])
def test_expire_and_abort_in_both_orders_end_once(first: str) -> None:
    """Bug list 36: whichever of expiry and abort comes second finds nothing, and that is fine."""
    table = table_with_offer()
    actions = {"expire": lambda: table.tick(100.0), "abort": lambda: table.fail(TICKET, "cancelled", "", 100.0)}
    order = [first, *({"expire", "abort"} - {first})]
    effects = [effect for name in order for effect in actions[name]()]
    assert sum(isinstance(effect, SourceEnded) for effect in effects) == 1
    assert table.blocks_ready(TICKET, BLOCKS, 101.0) == []
    assert seal(table, 101.0) == []
    assert table.on_message(DECODE, grant(), 101.0) == []


def test_sweep_ends_every_expired_ticket_whatever_the_order() -> None:
    """Bug list 37: a live lease in front does not hide an expired one behind it."""
    rng = random.Random(3)
    table = SourceTable(9.0, 100.0, SIZES)
    tickets = [new_ticket(IDS) for _ in range(50)]
    for ticket in tickets:
        table.open(ticket, DECODE, plan(4, 1, 1), 0.0)
    alive = set(rng.sample(tickets, 20))
    table.on_message(DECODE, Renew(tickets=sorted(alive)), 5.0)
    found = {effect.ticket for effect in table.tick(9.0) if isinstance(effect, SourceEnded)}
    assert found == set(tickets) - alive


def test_fail_with_a_long_text_stays_a_legal_message() -> None:
    table = table_with_offer()
    failed, *end = table.fail(TICKET, "c" * 100, "x" * 5000, 0.1)
    assert isinstance(failed, SendMessage)
    assert isinstance(failed.message, Failed)
    assert (len(failed.message.code), len(failed.message.message)) == (64, 1000)
    assert end == ended(failed.message.code, failed.message.message)


def test_timers_after_the_end_do_nothing() -> None:
    """Bug list 30: no timer outlives its ticket."""
    table = table_with_offer()
    table.fail(TICKET, "cancelled", "", 0.1)
    for now in (1.0, 2.0, 9.0, 1e6):
        assert table.tick(now) == []
    assert table.next_deadline is None
