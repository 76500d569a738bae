"""Grants in portions as prefill advances, what Done must say of what came, and whose offer counts."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from penstock.core.errors import InternalError
from penstock.core.ids import BlockId, SeededIds, Ticket, WorkerKey, new_ticket
from penstock.kvtransfer.destination import DestinationTable
from penstock.kvtransfer.digest import DIGEST_BYTES, block_digest, combined_digest
from penstock.kvtransfer.effects import (
    AcceptBlocks,
    Advanced,
    BlocksArrived,
    DestinationEffect,
    Offered,
    Received,
    ReceiveFailed,
    Renewing,
    Revoke,
    Revoked,
    SendMessage,
)
from penstock.kvtransfer.incoming import Granting
from penstock.protocol.messages import Ack, Cancel, Done, Grant, Offer, Phases, Reached

PREFILL = WorkerKey("prefill-0", "a" * 16)
IDS = SeededIds(3)
TICKET = new_ticket(IDS)
PROOF = b"p" * 16
NUM_BLOCKS, NUM_TOKENS = 6, 23
TABLE = tuple(map(BlockId, (9, 8, 4, 5, 6, 7)))


def digest_of(ordinal: int) -> bytes:
    return block_digest(memoryview(bytes([ordinal])))


def offer(**changes: Any) -> Offer:
    return msgspec.structs.replace(Offer(TICKET, NUM_TOKENS, NUM_BLOCKS, 4, 2, PROOF), **changes)


def arrived(*ordinals: int, generation: int = 1) -> BlocksArrived:
    return BlocksArrived(PREFILL, TICKET, generation, ordinals, (), tuple(map(digest_of, ordinals)))


def done(held: int = 1) -> Done:
    digests = b"".join(map(digest_of, range(held, NUM_BLOCKS)))
    return Done(TICKET, 1, NUM_BLOCKS - held, NUM_TOKENS, (), Phases(), digests)


def offered() -> DestinationTable:
    table = DestinationTable(9.0, early_s=2.0)
    table.expect(TICKET, PREFILL, 0.0, PROOF)
    offered = Offered(TICKET, NUM_TOKENS, NUM_BLOCKS, 4, 2)
    assert table.on_message(PREFILL, offer(), 0.0) == [Renewing(PREFILL, TICKET, is_alive=True), offered]
    return table


def portion(stop: int, held: int = 1) -> Granting:
    return Granting(held, stop, held, TABLE[:stop])


def granted(stop: int = 2) -> DestinationTable:
    table = offered()
    table.grant(TICKET, portion(stop), 0.0)
    return table


def codes(effects: list[DestinationEffect]) -> list[str]:
    return [effect.code for effect in effects if isinstance(effect, ReceiveFailed)]


# ---- portions ----


def test_each_portion_opens_what_the_last_one_left_and_keeps_its_generation() -> None:
    table = granted(2)
    assert table.grant(TICKET, portion(5), 1.0) == [
        AcceptBlocks(PREFILL, TICKET, 1, 2, 5, TABLE[:5], NUM_TOKENS),
        SendMessage(PREFILL, Grant(TICKET, 1, 1, 5)),
    ]
    table.check_invariants()
    assert table.grant(TICKET, portion(6), 2.0)[0] == AcceptBlocks(PREFILL, TICKET, 1, 5, 6, TABLE, NUM_TOKENS)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (portion(1), "up to 1 of 6"),
        (Granting(2, 4, 1, TABLE[:4]), "2 held"),
        (Granting(1, 4, 2, TABLE[:4]), "1 held"),
        (Granting(1, 7, 1, TABLE[:6]), "up to 7 of 6"),
        (Granting(1, 4, 1, (TABLE[0], TABLE[2], TABLE[1], TABLE[3])), "other blocks"),
        (Granting(1, 4, 1, TABLE[:1]), "other blocks"),
        (Granting(1, 4, 1, (*TABLE[:3], TABLE[2])), "granted twice"),
        (Granting(1, 4, 1, (*TABLE[:3], TABLE[1])), "granted twice"),
    ],
)
def test_portion_that_contradicts_the_one_before_is_our_own_bug(wrong: Granting, match: str) -> None:
    table = granted(2)
    with pytest.raises(InternalError, match=match):
        table.grant(TICKET, wrong, 1.0)
    table.check_invariants()
    assert table.grant(TICKET, portion(3), 1.0)


def test_reached_is_reported_when_it_is_news() -> None:
    table = offered()
    assert table.on_message(PREFILL, Reached(TICKET, 4), 0.1) == [Advanced(TICKET, 4)]
    for again in (4, 3, 0, NUM_BLOCKS + 1):
        assert table.on_message(PREFILL, Reached(TICKET, again), 0.2) == []
    table.grant(TICKET, portion(4), 0.3)
    assert table.on_message(PREFILL, Reached(TICKET, 6), 0.4) == [Advanced(TICKET, 6)]
    assert table.stale == 0
    assert table.on_message(WorkerKey("other", "b" * 16), Reached(TICKET, 6), 0.5) == []
    assert table.on_message(PREFILL, Reached(new_ticket(IDS), 6), 0.5) == []
    assert table.stale == 2


def test_reached_before_expect_is_kept_with_the_early_offer() -> None:
    """Else decode would make room for the first chunk only, until prefill says it again a third of a lease later."""
    table = DestinationTable(9.0)
    table.on_message(PREFILL, offer(), 0.0)
    for reached in (4, 3, NUM_BLOCKS + 1):
        assert table.on_message(PREFILL, Reached(TICKET, reached), 0.1) == []
    assert table.stale == 0
    assert table.expect(TICKET, PREFILL, 0.2, PROOF)[-1] == Offered(TICKET, NUM_TOKENS, NUM_BLOCKS, 4, 4)


def test_reached_while_revoking_asks_for_no_room() -> None:
    table = granted(2)
    table.cancel(TICKET, "cancelled", "gone", 0.5)
    assert table.on_message(PREFILL, Reached(TICKET, 6), 0.6) == []


def test_reached_of_an_ended_ticket_hears_the_last_word_again() -> None:
    table = granted(2)
    table.cancel(TICKET, "cancelled", "gone", 0.5)
    table.on_revoked(Revoked(PREFILL, TICKET), 0.6)
    cancel = Cancel(TICKET, "cancelled", "gone")
    assert table.on_message(PREFILL, Reached(TICKET, 6), 1.0) == [SendMessage(PREFILL, cancel)]


def test_portion_is_repeated_only_while_something_granted_has_not_come() -> None:
    table = granted(2)
    table.on_arrived(arrived(1), 1.0)
    assert [effect for effect in table.tick(8.0) if isinstance(effect, SendMessage)] == []
    table.grant(TICKET, portion(3), 8.0)
    assert table.next_deadline == 11.0
    assert table.tick(11.0) == [SendMessage(PREFILL, Grant(TICKET, 1, 1, 3))]


@pytest.mark.parametrize("held", [1, NUM_BLOCKS])
def test_grant_is_repeated_until_done_when_nothing_more_has_to_come(held: int) -> None:
    """A lost grant of what is all here already would leave both sides renewing for ever."""
    table = offered()
    table.grant(TICKET, portion(NUM_BLOCKS, held), 0.0)
    if held < NUM_BLOCKS:
        table.on_arrived(arrived(*range(held, NUM_BLOCKS)), 0.0)
    again = SendMessage(PREFILL, Grant(TICKET, 1, held, NUM_BLOCKS))
    assert [table.tick(now) for now in (2.9, 3.0, 5.9, 6.0)] == [[], [again], [], [again]]
    assert table.on_message(PREFILL, done(held), 6.1)[-1] == Received(TICKET, done(held))
    assert table.next_deadline is None


def test_done_before_the_last_portion_does_not_complete() -> None:
    table = granted(2)
    table.on_arrived(arrived(1), 1.0)
    assert table.on_message(PREFILL, done(), 1.1) == []
    table.grant(TICKET, portion(6), 1.2)
    assert table.on_arrived(arrived(2, 3), 1.3) == []
    assert table.on_arrived(arrived(4, 5), 1.4)[-1] == Received(TICKET, done())


def test_offer_that_reaches_further_than_it_goes_is_refused() -> None:
    for changes in ({"reached": 7}, {"num_blocks": 5, "reached": 1}, {"num_tokens": 25}, {"block_size": 8}):
        table = DestinationTable(9.0)
        table.expect(TICKET, PREFILL, 0.0, PROOF)
        effects = table.on_message(PREFILL, offer(**changes), 0.1)
        assert codes(effects) == ["transfer_failed"]
        assert [type(e.message) for e in effects if isinstance(e, SendMessage)] == [Cancel]


def test_random_portions_and_arrivals_complete_exactly_when_all_is_here() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        held = rng.randint(0, NUM_BLOCKS)
        table, stop, waiting, is_done, seen = offered(), held, list[int](), False, 0
        effects = table.grant(TICKET, portion(held, held), 0.0)
        while not any(isinstance(effect, Received) for effect in effects):
            match rng.randrange(3):
                case 0 if stop < NUM_BLOCKS:
                    before, stop = stop, rng.randint(stop, NUM_BLOCKS)
                    waiting += range(before, stop)
                    effects = table.grant(TICKET, portion(stop, held), 0.0)
                case 1 if waiting:
                    rng.shuffle(waiting)
                    count = rng.randint(1, len(waiting))
                    some, waiting = waiting[:count], waiting[count:]
                    seen += count
                    effects = table.on_arrived(arrived(*some), 0.0)
                case 2 if not is_done:
                    effects, is_done = table.on_message(PREFILL, done(held), 0.0), True
            table.check_invariants()
        assert (stop, seen, is_done) == (NUM_BLOCKS, NUM_BLOCKS - held, True), seed
        assert effects[0] == SendMessage(PREFILL, Ack(TICKET, 1))


# ---- what Done says of what came ----


def _changed(**changes: Any) -> Done:
    return msgspec.structs.replace(done(), **changes)


_DIGESTS = [digest_of(ordinal) for ordinal in range(1, NUM_BLOCKS)]


@pytest.mark.parametrize(
    ("word", "code"),
    [
        (_changed(digests=b"".join([*_DIGESTS[:-1], bytes(DIGEST_BYTES)])), "checksum_mismatch"),
        (_changed(digests=b"".join([_DIGESTS[1], _DIGESTS[0], *_DIGESTS[2:]])), "checksum_mismatch"),
        (_changed(digests=b"".join([*_DIGESTS[:-1], _DIGESTS[0]])), "checksum_mismatch"),
        (_changed(digests=b""), "transfer_failed"),
        (_changed(digests=b"".join(_DIGESTS[:-1])), "transfer_failed"),
        (_changed(digests=b"".join(_DIGESTS) + b"x"), "transfer_failed"),
    ],
    ids=["wrong", "swapped", "repeated", "missing", "one missing", "torn"],
)
@pytest.mark.parametrize("done_first", [True, False])
def test_done_that_does_not_vouch_for_what_came_is_a_failure(word: Done, code: str, done_first: bool) -> None:
    table = granted(NUM_BLOCKS)
    steps = [lambda: table.on_arrived(arrived(1, 2, 3, 4, 5), 1.0), lambda: table.on_message(PREFILL, word, 1.0)]
    effects = [effect for step in (reversed(steps) if done_first else steps) for effect in step()]
    assert effects[0] == Revoke(PREFILL, TICKET)
    assert not any(isinstance(effect, Received) for effect in effects)
    assert not any(isinstance(effect, SendMessage) and isinstance(effect.message, Ack) for effect in effects)
    assert codes(table.on_revoked(Revoked(PREFILL, TICKET), 1.1)) == [code]


def test_right_done_after_the_arrivals_in_any_order_is_received() -> None:
    """The control of the test above."""
    table = granted(NUM_BLOCKS)
    table.on_arrived(arrived(5, 3, 1), 1.0)
    table.on_arrived(arrived(2, 4), 1.0)
    assert table.on_message(PREFILL, done(), 1.0)[-1] == Received(TICKET, done())


def test_combined_digest_knows_pieces_and_places_and_not_the_order_of_coming() -> None:
    one, two = (0, 2, b"1" * DIGEST_BYTES), (2, 4, b"2" * DIGEST_BYTES)
    good = combined_digest([one, two])
    assert combined_digest([two, one]) == good
    assert len(good) == DIGEST_BYTES
    others = [
        [one],
        [two],
        [(0, 2, b"2" * DIGEST_BYTES), (2, 4, b"1" * DIGEST_BYTES)],
        [(0, 3, b"1" * DIGEST_BYTES), (3, 3, b"2" * DIGEST_BYTES)],
        [one, (2, 4, b"2" * (DIGEST_BYTES - 1) + b"3")],
        [(0, 6, b"1" * DIGEST_BYTES)],
        [],
    ]
    assert good not in {combined_digest(other) for other in others}
    assert len({combined_digest(other) for other in others}) == len(others)


# ---- whose offer counts ----


def test_offer_with_a_wrong_proof_changes_nothing_and_is_counted() -> None:
    table = DestinationTable(9.0)
    table.expect(TICKET, PREFILL, 0.0, PROOF)
    for proof in (bytes(16), b"q" * 16, PROOF[:15] + b"x"):
        assert table.on_message(PREFILL, offer(proof=proof), 0.1) == []
    assert table.stale == 3
    assert table.on_message(PREFILL, offer(), 0.2)[-1] == Offered(TICKET, NUM_TOKENS, NUM_BLOCKS, 4, 2)


def test_early_offer_with_a_wrong_proof_does_not_stand_in_for_the_right_one() -> None:
    table = DestinationTable(9.0)
    table.on_message(PREFILL, offer(proof=b"q" * 16), 0.0)
    assert table.expect(TICKET, PREFILL, 0.1, PROOF) == []
    assert (table.stale, table.num_early) == (1, 0)
    assert table.on_message(PREFILL, offer(), 0.2)[-1] == Offered(TICKET, NUM_TOKENS, NUM_BLOCKS, 4, 2)


def test_offer_of_another_ticket_with_this_proof_is_nobodys() -> None:
    table = offered()
    other = Ticket(b"o" * 16)
    table.expect(other, PREFILL, 0.1, b"r" * 16)
    assert table.on_message(PREFILL, msgspec.structs.replace(offer(), ticket=other), 0.2) == []
    assert table.stale == 1
