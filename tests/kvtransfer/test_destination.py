"""The decode side alone, call by call. What has its own file: portions and digests (test_portions.py)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from penstock.core.errors import InternalError
from penstock.core.ids import BlockId, SeededIds, Ticket, WorkerKey, new_ticket
from penstock.kvtransfer.destination import DestinationTable
from penstock.kvtransfer.digest import DIGEST_BYTES
from penstock.kvtransfer.effects import (
    AcceptBlocks,
    BlocksArrived,
    Offered,
    Received,
    ReceiveFailed,
    Renewing,
    Revoke,
    Revoked,
    SendMessage,
)
from penstock.kvtransfer.incoming import Granting
from penstock.protocol.messages import Ack, Cancel, Done, Failed, Grant, HandoffMessage, Offer, Phases, Reached, Renew

PREFILL, OTHER = WorkerKey("prefill-0", "a" * 16), WorkerKey("prefill-1", "b" * 16)
IDS = SeededIds(2)
TICKET = new_ticket(IDS)
PROOF = b"p" * 16
OFFER = Offer(ticket=TICKET, num_tokens=15, num_blocks=4, block_size=4, reached=4, proof=PROOF)
TABLE = tuple(map(BlockId, (11, 5, 6, 2)))  # the first is held
ALIVE, ENDED = Renewing(PREFILL, TICKET, is_alive=True), Renewing(PREFILL, TICKET, is_alive=False)
OFFERED = [ALIVE, Offered(TICKET, 15, 4, 4, 4)]


def digest_of(ordinal: int) -> bytes:
    return bytes([ordinal]) * DIGEST_BYTES


def done(generation: int = 1, num_blocks: int = 3, num_tokens: int = 15) -> Done:
    return Done(
        ticket=TICKET,
        generation=generation,
        num_blocks=num_blocks,
        num_tokens=num_tokens,
        first_tokens=(),
        phases=Phases(),
        digests=b"".join(map(digest_of, range(4 - num_blocks, 4))),
    )


def arrived(*ordinals: int, generation: int = 1, corrupt: tuple[int, ...] = ()) -> BlocksArrived:
    return BlocksArrived(PREFILL, TICKET, generation, ordinals, corrupt, tuple(map(digest_of, ordinals)))


def offer_of_one(ticket: Ticket) -> Offer:
    """One token in one block."""
    return Offer(ticket=ticket, num_tokens=1, num_blocks=1, block_size=4, reached=1)


def granting_one(block: int) -> Granting:
    return Granting(0, 1, 0, (BlockId(block),))


def expecting() -> DestinationTable:
    table = DestinationTable(9.0, expect_timeout_s=60.0, early_s=2.0, max_early=3, max_ended=8)
    assert table.expect(TICKET, PREFILL, 0.0, PROOF) == []
    return table


def offered() -> DestinationTable:
    table = expecting()
    assert table.on_message(PREFILL, OFFER, 0.0) == OFFERED
    return table


def granted() -> DestinationTable:
    table = offered()
    assert table.grant(TICKET, Granting(1, 4, 1, TABLE), 0.0) == [
        AcceptBlocks(PREFILL, TICKET, 1, 1, 4, TABLE, 15),
        SendMessage(PREFILL, Grant(ticket=TICKET, generation=1, held=1, stop=4)),
    ]
    return table


def sent(effects: list) -> list[type]:
    return [type(effect.message) for effect in effects if isinstance(effect, SendMessage)]


def ends(effects: list) -> list:
    return [effect for effect in effects if isinstance(effect, Received | ReceiveFailed)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_blocks_and_done_in_any_order_complete_once(order: tuple[int, ...]) -> None:
    table = granted()
    steps: list[Callable[[], list]] = [
        lambda: table.on_arrived(arrived(1), 1.0),
        lambda: table.on_arrived(arrived(3, 2), 1.0),
        lambda: table.on_message(PREFILL, done(), 1.0),
    ]
    effects = []
    for at in order:
        effects += steps[at]()
        table.check_invariants()
    assert effects == [SendMessage(PREFILL, Ack(ticket=TICKET, generation=1)), ENDED, Received(TICKET, done())]
    assert table.active() == []


def test_everything_held_completes_with_done_alone() -> None:
    table = offered()
    table.grant(TICKET, Granting(4, 4, 4, tuple(map(BlockId, range(4)))), 0.0)
    assert ends(table.on_message(PREFILL, done(num_blocks=0), 0.1)) == [Received(TICKET, done(num_blocks=0))]


def test_early_offer_waits_for_expect() -> None:
    table = DestinationTable(9.0)
    assert table.on_message(PREFILL, OFFER, 0.0) == []
    assert table.num_early == 1
    assert table.expect(TICKET, PREFILL, 1.0, PROOF) == OFFERED
    assert table.num_early == 0


def test_early_offer_nobody_asks_for_is_cancelled_and_a_late_expect_fails_at_once() -> None:
    """Bug list 14: what is refused before admission frees the source's blocks within the early time."""
    table = DestinationTable(9.0, early_s=2.0)
    table.on_message(PREFILL, OFFER, 0.0)
    assert table.next_deadline == 2.0
    assert sent(table.tick(2.0)) == [Cancel]
    (failed,) = table.expect(TICKET, PREFILL, 3.0)
    assert isinstance(failed, ReceiveFailed)
    with pytest.raises(InternalError, match="expected twice"):
        table.expect(TICKET, PREFILL, 3.0)


def test_early_offers_are_bounded() -> None:
    """Bug list 7: unknown tickets make no state grow."""
    table = DestinationTable(9.0, max_early=3, max_ended=8)
    for _ in range(1000):
        table.on_message(PREFILL, offer_of_one(new_ticket(IDS)), 0.0)
        table.on_message(PREFILL, Renew(tickets=[new_ticket(IDS)]), 0.0)
    assert table.num_early == 3
    assert len(table._ended) == 8


def test_early_offer_of_another_peer_takes_nobodys_place() -> None:
    table = DestinationTable(9.0)
    table.on_message(OTHER, OFFER, 0.0)
    assert table.expect(TICKET, PREFILL, 0.1, PROOF) == []
    assert table.on_message(OTHER, OFFER, 0.2) == []
    assert table.stale == 1
    assert table.on_message(PREFILL, OFFER, 0.3) == OFFERED


def test_failed_before_expect_makes_expect_fail_with_its_reason() -> None:
    table = DestinationTable(9.0)
    table.on_message(PREFILL, OFFER, 0.0)
    table.on_message(PREFILL, Failed(ticket=TICKET, code="cancelled", message="gone"), 0.1)
    assert table.expect(TICKET, PREFILL, 0.2) == [ReceiveFailed(TICKET, "cancelled", "gone")]


def test_cancel_before_grant_ends_at_once_and_tells_the_source() -> None:
    for table in (expecting(), offered()):
        effects = table.cancel(TICKET, "cancelled", "client left", 0.5)
        assert sent(effects) == [Cancel]
        assert ends(effects) == [ReceiveFailed(TICKET, "cancelled", "client left")]
        assert table.cancel(TICKET, "cancelled", "again", 0.6) == []


@pytest.mark.parametrize(
    ("trigger", "code", "tells"),
    [
        (lambda t: t.cancel(TICKET, "cancelled", "x", 1.0), "cancelled", [Cancel]),
        (lambda t: t.on_arrived(arrived(1, corrupt=(2,)), 1.0), "checksum_mismatch", [Cancel]),
        (lambda t: t.on_message(PREFILL, done(num_blocks=2), 1.0), "transfer_failed", [Cancel]),
        (lambda t: t.on_message(PREFILL, done(num_tokens=14), 1.0), "transfer_failed", [Cancel]),
        (lambda t: t.on_message(PREFILL, Failed(ticket=TICKET, code="e", message="x"), 1.0), "e", []),
        (lambda t: t.tick(9.0), "lease_expired", [Cancel]),
    ],
)
def test_failure_after_grant_gives_blocks_back_only_when_revoked(trigger: Callable, code: str, tells: list) -> None:
    """Bug list 1: a granted block is not reused while a write can happen."""
    table = granted()
    effects = trigger(table)
    assert effects[0] == Revoke(PREFILL, TICKET)
    assert sent(effects) == tells
    assert ends(effects) == []
    table.check_invariants()
    assert table.cancel(TICKET, "cancelled", "second reason", 9.5) == []
    assert ends(table.on_arrived(arrived(1, 2, 3), 9.5)) == []
    assert ends(table.on_message(PREFILL, done(), 9.5)) == []
    quiet, end = table.on_revoked(Revoked(PREFILL, TICKET), 9.6)
    assert quiet == ENDED
    assert isinstance(end, ReceiveFailed)
    assert end.code == code
    assert table.on_revoked(Revoked(PREFILL, TICKET), 9.7) == []


def test_peer_lost_while_revoking_keeps_the_first_reason() -> None:
    table = granted()
    table.cancel(TICKET, "cancelled", "x", 1.0)
    assert ends(table.peer_lost(PREFILL, 1.1)) == [ReceiveFailed(TICKET, "cancelled", "x")]


@pytest.mark.parametrize("make", [expecting, offered, granted])
def test_peer_lost_ends_every_state_at_once(make: Callable[[], DestinationTable]) -> None:
    table = make()
    (end,) = ends(table.peer_lost(PREFILL, 1.0))
    assert end.code == "node_lost"
    assert table.active() == []
    table.check_invariants()


@pytest.mark.parametrize("order", list(itertools.permutations(["abort", "lost", "failed", "revoked"])))
def test_aborts_of_both_sides_in_every_order_end_once(order: tuple[str, ...]) -> None:
    """Bug lists 9 and 13: abort here, source gone, source failed, in any order."""
    table = granted()
    actions: dict[str, Callable[[], list]] = {
        "abort": lambda: table.cancel(TICKET, "cancelled", "x", 1.0),
        "lost": lambda: table.peer_lost(PREFILL, 1.0),
        "failed": lambda: table.on_message(PREFILL, Failed(ticket=TICKET, code="e", message="x"), 1.0),
        "revoked": lambda: table.on_revoked(Revoked(PREFILL, TICKET), 1.0),
    }
    effects = [effect for name in order for effect in actions[name]()]
    assert len(ends(effects)) == 1
    table.check_invariants()


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (PREFILL, done(generation=2)),
        (OTHER, done()),
        (OTHER, Failed(ticket=TICKET, code="e", message="")),
        (PREFILL, Failed(ticket=b"?" * 16, code="e", message="")),
        (PREFILL, OFFER),
        (PREFILL, Ack(ticket=TICKET, generation=1)),
    ],
)
def test_message_that_does_not_fit_is_counted_and_ignored(peer: WorkerKey, message: HandoffMessage) -> None:
    """Bug list 15."""
    table = granted()
    assert table.on_message(peer, message, 1.0) == []
    assert table.stale == 1
    assert table.active() == [TICKET]


def test_arrivals_of_unknown_ticket_or_generation_are_counted() -> None:
    table = granted()
    assert table.on_arrived(BlocksArrived(PREFILL, new_ticket(IDS), 1, (1,), digests=(digest_of(1),)), 1.0) == []
    assert table.on_arrived(arrived(1, 2, 3, generation=7), 1.0) == []
    assert table.stale == 2


@pytest.mark.parametrize("make", [expecting, offered, granted])
def test_every_wait_has_a_finite_deadline(make: Callable[[], DestinationTable]) -> None:
    """Bug list 16."""
    table = make()
    effects: list = []
    while table.next_deadline is not None:
        assert table.next_deadline < 1000.0
        now = table.next_deadline
        effects += table.tick(now)
        if any(isinstance(effect, Revoke) for effect in effects) and not ends(effects):
            effects += table.on_revoked(Revoked(PREFILL, TICKET), now)
    assert len(ends(effects)) == 1


def test_renew_of_the_source_extends_the_lease_until_done() -> None:
    """Bug list 17: after Done only blocks count, so a lost push is noticed."""
    table = granted()
    for now in range(1, 40):
        table.on_message(PREFILL, Renew(tickets=[TICKET]), float(now))
        assert not any(isinstance(effect, Revoke) for effect in table.tick(float(now)))
    table.on_message(PREFILL, done(), 40.0)
    table.on_message(PREFILL, Renew(tickets=[TICKET]), 48.0)
    assert any(isinstance(effect, Revoke) for effect in table.tick(49.0))


def test_grant_is_repeated_until_something_comes() -> None:
    table = granted()
    repeated = [effect for effect in table.tick(3.0) if sent([effect]) == [Grant]]
    assert len(repeated) == 1
    table.on_arrived(arrived(1), 4.0)
    assert sent(table.tick(6.9)) == []
    assert sent(table.tick(7.0)) == [Grant]
    table.on_arrived(arrived(2, 3), 7.1)
    table.on_message(PREFILL, done(), 7.2)
    assert table.tick(16.0) == []


def test_ticket_is_named_alive_from_its_offer_to_its_end() -> None:
    """The link's own thread renews it: the table only says for how long. An expected ticket is not promised yet."""
    for table, count in ((expecting(), 0), (offered(), 1), (granted(), 1)):
        effects = table.tick(3.0) + table.peer_lost(PREFILL, 3.1)
        assert effects.count(ENDED) == count
        assert ALIVE not in effects


def test_last_word_is_repeated_to_a_source_that_has_not_heard_it() -> None:
    table = granted()
    table.on_arrived(arrived(1, 2, 3), 1.0)
    table.on_message(PREFILL, done(), 1.0)
    ack = SendMessage(PREFILL, Ack(ticket=TICKET, generation=1))
    assert table.on_message(PREFILL, done(), 1.1) == [ack]
    assert table.on_message(PREFILL, Renew(tickets=[TICKET]), 1.2) == []
    assert table.on_message(PREFILL, Renew(tickets=[TICKET]), 4.0) == [ack]
    assert table.on_message(OTHER, Renew(tickets=[TICKET]), 4.0) == []


def test_asking_twice_for_a_one_shot_hand_off_is_refused() -> None:
    """Bug lists 18 and 19: expected or granted twice is our bug, an offer twice is the network's."""
    table = granted()
    with pytest.raises(InternalError, match="expected twice"):
        table.expect(TICKET, PREFILL, 1.0)
    table.cancel(TICKET, "cancelled", "", 1.0)
    with pytest.raises(InternalError, match="granted while revoking"):
        table.grant(TICKET, Granting(1, 4, 1, TABLE), 1.0)
    table.peer_lost(PREFILL, 1.0)
    with pytest.raises(InternalError, match="expected twice"):
        table.expect(TICKET, PREFILL, 1.0)


def test_grant_of_wrong_count_or_of_a_granted_block_is_refused() -> None:
    table = granted()
    second = new_ticket(IDS)
    table.expect(second, PREFILL, 0.0)
    table.on_message(PREFILL, offer_of_one(second), 0.0)
    with pytest.raises(InternalError, match="granted twice"):
        table.grant(second, granting_one(TABLE[1]), 0.1)
    with pytest.raises(InternalError, match="of 1"):
        table.grant(second, Granting(0, 2, 0, (BlockId(8), BlockId(9))), 0.1)
    with pytest.raises(InternalError, match="2 held"):
        table.grant(second, Granting(2, 1, 0, (BlockId(8),)), 0.1)
    with pytest.raises(InternalError, match="granted while unknown"):
        table.grant(new_ticket(IDS), granting_one(8), 0.1)
    table.grant(second, Granting(0, 0, 0, ()), 0.1)
    table.check_invariants()


@pytest.mark.parametrize("count", range(1, 9))
def test_many_tickets_are_independent_when_some_are_aborted(count: int) -> None:
    """Bug list 18: n hand-offs, any of them aborted, the others complete."""
    rng = random.Random(count)
    table = DestinationTable(9.0)
    tickets = [new_ticket(IDS) for _ in range(count)]
    for at, ticket in enumerate(tickets):
        table.expect(ticket, PREFILL, 0.0)
        table.on_message(PREFILL, offer_of_one(ticket), 0.0)
        table.grant(ticket, granting_one(at), 0.0)
    aborted = set(rng.sample(tickets, rng.randint(0, count)))
    received: set[Ticket] = set()
    for at, ticket in enumerate(tickets):
        if ticket in aborted:
            table.cancel(ticket, "cancelled", "", 1.0)
        message = Done(ticket, at + 1, 1, 1, (), Phases(), digest_of(at))
        effects = table.on_message(PREFILL, message, 1.0)
        effects += table.on_arrived(BlocksArrived(PREFILL, ticket, at + 1, (0,), digests=(digest_of(at),)), 1.0)
        received |= {effect.ticket for effect in effects if isinstance(effect, Received)}
        table.check_invariants()
    assert received == set(tickets) - aborted


def test_sweep_ends_every_expired_ticket_whatever_the_order() -> None:
    """Bug list 37."""
    rng = random.Random(3)
    table = DestinationTable(9.0)
    tickets = [new_ticket(IDS) for _ in range(50)]
    for ticket in tickets:
        table.expect(ticket, PREFILL, 0.0)
        table.on_message(PREFILL, offer_of_one(ticket), 0.0)
    alive = set(rng.sample(tickets, 20))
    table.on_message(PREFILL, Renew(tickets=sorted(alive)), 5.0)
    assert {end.ticket for end in ends(table.tick(9.0))} == set(tickets) - alive


@pytest.mark.parametrize("first", ["expire", "abort"])
def test_expire_and_abort_in_both_orders_end_once(first: str) -> None:
    """Bug list 36."""
    table = offered()
    actions = {"expire": lambda: table.tick(9.0), "abort": lambda: table.cancel(TICKET, "cancelled", "", 9.0)}
    order = [first, *({"expire", "abort"} - {first})]
    assert len(ends([effect for name in order for effect in actions[name]()])) == 1


def test_timers_after_the_end_do_nothing() -> None:
    """Bug list 30."""
    table = offered()
    table.cancel(TICKET, "cancelled", "", 0.1)
    for now in (1.0, 9.0, 60.0, 1e6):
        assert table.tick(now) == []
    assert table.next_deadline is None


def test_random_messages_never_raise_and_keep_the_invariants() -> None:
    """Bug list 15, S3: replayed and swapped frames of every kind."""
    rng = random.Random(11)
    tickets = [new_ticket(IDS) for _ in range(4)]
    table, now = DestinationTable(9.0, max_early=2, max_ended=2), 0.0
    for _ in range(5000):
        now += rng.random()
        ticket, small = rng.choice(tickets), rng.randint(0, 4)
        messages: list[HandoffMessage] = [
            Offer(ticket=ticket, num_tokens=small, num_blocks=small, block_size=4, reached=small),
            Reached(ticket=ticket, reached=small),
            Grant(ticket=ticket, generation=small, held=small, stop=small),
            Failed(ticket=ticket, code="", message=""),
            Ack(ticket=ticket, generation=small),
            Cancel(ticket=ticket, code="", message=""),
            Renew(tickets=[ticket, rng.choice(tickets)]),
            Done(
                ticket=ticket,
                generation=small,
                num_blocks=small,
                num_tokens=small,
                first_tokens=(),
                phases=Phases(),
            ),
        ]
        message = rng.choice(messages)
        effects = table.on_message(rng.choice([PREFILL, OTHER]), message, now)
        effects += table.on_arrived(BlocksArrived(PREFILL, ticket, small, (small,), digests=(bytes(8),)), now)
        effects += table.on_revoked(Revoked(PREFILL, ticket), now)
        assert ends(effects) == []
        table.check_invariants()
