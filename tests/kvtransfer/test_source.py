"""The prefill side alone, call by call."""

from __future__ import annotations

import random

import pytest

from penstock.core.errors import InternalError
from penstock.core.ids import BlockId, SeededIds, Ticket, WorkerKey, new_ticket
from penstock.kvtransfer.effects import SendBlocks, SendMessage, SourceEnded
from penstock.kvtransfer.source import SourceTable
from penstock.protocol.messages import Ack, Cancel, Done, Failed, Grant, Offer, Phases, Renew

DECODE, OTHER = WorkerKey("decode-0", "d" * 16), WorkerKey("decode-1", "e" * 16)
IDS = SeededIds(1)
TICKET = new_ticket(IDS)
BLOCKS = [BlockId(n) for n in (7, 3, 9, 4)]


def table_with_offer(ticket: Ticket = TICKET, num_blocks: int = 4) -> SourceTable:
    table = SourceTable(lease_s=9.0, offer_timeout_s=2.0)
    assert table.open(ticket, DECODE, 15, num_blocks, 0.0) == [
        SendMessage(DECODE, Offer(ticket=ticket, num_tokens=15, num_blocks=num_blocks))
    ]
    return table


def grant(held: int = 0, generation: int = 5) -> Grant:
    return Grant(ticket=TICKET, generation=generation, held=held)


def seal(table: SourceTable, now: float = 1.0) -> list:
    return table.seal(TICKET, BLOCKS, 15, (), Phases(), now)


def test_blocks_ready_before_grant_waits_and_goes_in_one_push() -> None:
    table = table_with_offer()
    assert table.blocks_ready(TICKET, BLOCKS[:2], 0.1) == []
    assert table.blocks_ready(TICKET, BLOCKS[:3], 0.2) == []
    assert table.on_message(DECODE, grant(), 0.3) == [SendBlocks(DECODE, TICKET, 5, (0, 1, 2), tuple(BLOCKS[:3]))]
    table.check_invariants()


def test_seal_pushes_the_rest_and_done_and_ack_ends_it() -> None:
    table = table_with_offer()
    table.on_message(DECODE, grant(held=1), 0.1)
    assert table.blocks_ready(TICKET, BLOCKS[:2], 0.2) == [SendBlocks(DECODE, TICKET, 5, (1,), (BLOCKS[1],))]
    push, done = seal(table)
    assert push == SendBlocks(DECODE, TICKET, 5, (2, 3), (BLOCKS[2], BLOCKS[3]))
    assert done == SendMessage(
        DECODE, Done(ticket=TICKET, generation=5, num_blocks=3, num_tokens=15, first_tokens=(), phases=Phases())
    )
    assert table.on_message(DECODE, Ack(ticket=TICKET, generation=5), 0.4) == [SourceEnded(TICKET)]
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
    table = SourceTable(9.0, 2.0, blocks_per_push=2)
    blocks = [BlockId(n) for n in range(5)]
    table.open(TICKET, DECODE, 17, 5, 0.0)
    table.blocks_ready(TICKET, blocks, 0.1)
    pushes = table.on_message(DECODE, grant(), 0.2)
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
        (DECODE, grant(held=5)),
        (DECODE, Grant(ticket=b"?" * 16, generation=1, held=0)),
        (DECODE, Ack(ticket=TICKET, generation=5)),
        (OTHER, Cancel(ticket=TICKET, code="cancelled", message="")),
        (DECODE, Offer(ticket=TICKET, num_tokens=1, num_blocks=1)),
    ],
)
def test_message_that_does_not_fit_is_counted_and_ignored(peer: WorkerKey, message: object) -> None:
    """Bug list 15: a late or strange message is a counter, never an end."""
    table = table_with_offer()
    assert table.on_message(peer, message, 0.5) == []  # type: ignore[arg-type]
    assert table.stale == 1
    assert table.active() == [TICKET]
    table.check_invariants()


def test_grant_of_another_generation_after_a_grant_is_stale() -> None:
    table = table_with_offer()
    table.on_message(DECODE, grant(), 0.1)
    assert table.on_message(DECODE, grant(generation=6), 0.2) == []
    assert table.stale == 1


def test_open_twice_is_refused() -> None:
    """Bug list 18: a ticket names one hand-off."""
    table = table_with_offer()
    with pytest.raises(InternalError, match="used once"):
        table.open(TICKET, DECODE, 15, 4, 0.1)


def test_seal_with_other_counts_is_refused() -> None:
    table = table_with_offer()
    with pytest.raises(InternalError, match="offered 4 and 15"):
        table.seal(TICKET, BLOCKS[:3], 15, (), Phases(), 0.1)
    with pytest.raises(InternalError, match="from 0 to 4"):
        table.blocks_ready(TICKET, [*BLOCKS, BlockId(1)], 0.1)


def test_offer_unanswered_ends_and_tells_the_peer() -> None:
    table = table_with_offer()
    assert table.next_deadline == 2.0
    failed, ended = table.tick(2.0)
    assert isinstance(failed, SendMessage)
    assert isinstance(failed.message, Failed)
    assert isinstance(ended, SourceEnded)
    assert ended.code == "transfer_failed"


def test_renew_keeps_a_queued_offer_alive_and_its_end_is_the_lease() -> None:
    table = table_with_offer()
    for now in range(1, 30):
        table.on_message(DECODE, Renew(tickets=[TICKET]), float(now))
        assert [type(e.message) for e in table.tick(float(now)) if isinstance(e, SendMessage)] in ([], [Renew])
    assert [e for e in table.tick(29 + 8.9) if isinstance(e, SourceEnded)] == []
    assert [e.code for e in table.tick(29 + 9.0) if isinstance(e, SourceEnded)] == ["lease_expired"]


def test_renew_goes_to_each_peer_every_third_of_the_lease() -> None:
    table = table_with_offer()
    second = new_ticket(IDS)
    table.open(second, OTHER, 4, 1, 1.0)
    table.on_message(DECODE, grant(), 1.0)
    table.on_message(OTHER, Renew(tickets=[second]), 1.0)
    assert table.tick(3.0) == [SendMessage(DECODE, Renew(tickets=[TICKET]))]
    assert table.tick(4.0) == [SendMessage(OTHER, Renew(tickets=[second]))]
    assert table.next_deadline == 6.0


def test_done_is_repeated_until_it_is_answered() -> None:
    """Bug list 17: the destination never counts to a number that it has not heard."""
    table = table_with_offer()
    table.on_message(DECODE, grant(), 0.1)
    done = seal(table, 0.2)[-1]
    table.on_message(DECODE, Renew(tickets=[TICKET]), 3.0)
    assert table.tick(3.0) == [SendMessage(DECODE, Renew(tickets=[TICKET]))]
    assert table.tick(6.0)[1:] == [done]


def test_peer_lost_ends_only_its_tickets() -> None:
    table = table_with_offer()
    second = new_ticket(IDS)
    table.open(second, OTHER, 4, 1, 0.0)
    (ended,) = table.peer_lost(DECODE, 1.0)
    assert isinstance(ended, SourceEnded)
    assert (ended.ticket, ended.code) == (TICKET, "node_lost")
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
    table = SourceTable(9.0, 100.0)
    tickets = [new_ticket(IDS) for _ in range(50)]
    for ticket in tickets:
        table.open(ticket, DECODE, 4, 1, 0.0)
    alive = set(rng.sample(tickets, 20))
    table.on_message(DECODE, Renew(tickets=sorted(alive)), 5.0)
    ended = {effect.ticket for effect in table.tick(9.0) if isinstance(effect, SourceEnded)}
    assert ended == set(tickets) - alive


def test_fail_with_a_long_text_stays_a_legal_message() -> None:
    table = table_with_offer()
    failed, ended = table.fail(TICKET, "c" * 100, "x" * 5000, 0.1)
    assert isinstance(failed, SendMessage)
    assert isinstance(failed.message, Failed)
    assert (len(failed.message.code), len(failed.message.message)) == (64, 1000)
    assert isinstance(ended, SourceEnded)


def test_timers_after_the_end_do_nothing() -> None:
    """Bug list 30: no timer outlives its ticket."""
    table = table_with_offer()
    table.fail(TICKET, "cancelled", "", 0.1)
    for now in (1.0, 2.0, 9.0, 1e6):
        assert table.tick(now) == []
    assert table.next_deadline is None
