"""What a destination's table says of blocks that were given, and how roles put them in place."""

from __future__ import annotations

import pytest

from penstock.core.errors import InternalError, ProtocolError
from penstock.core.ids import BlockId, SeededIds, WorkerKey, new_ticket
from penstock.engine.ledger import Ledger, ledger_bytes
from penstock.kvtransfer.destination import DestinationTable
from penstock.kvtransfer.digest import DIGEST_BYTES
from penstock.kvtransfer.effects import BlocksArrived, Received, Revoked
from penstock.kvtransfer.incoming import Granting
from penstock.kvtransfer.ownership import Candidates, Ownership, check_conservation, first_pool
from penstock.protocol.messages import Done, Offer, Phases

PREFILL = WorkerKey("prefill-0", "a" * 16)
TICKET = new_ticket(SeededIds(3))
OFFER = Offer(ticket=TICKET, num_tokens=12, num_blocks=3, block_size=4, reached=3)
TABLE = tuple(map(BlockId, (8, 9, 10)))
DIGESTS = tuple(bytes([at]) * DIGEST_BYTES for at in range(3))
NUMBERS = {"prefill-0": 1, "decode-0": 2}
SHARES = (8, 8)


def granted() -> DestinationTable:
    table = DestinationTable(9.0)
    table.expect(TICKET, PREFILL, 0.0)
    assert table.live_generations() == []
    table.on_message(PREFILL, OFFER, 0.0)
    assert table.live_generations() == []
    table.grant(TICKET, Granting(0, 3, 0, TABLE), 0.0)
    assert table.live_generations() == [1]
    return table


def done() -> Done:
    return Done(
        ticket=TICKET,
        generation=1,
        num_blocks=3,
        num_tokens=12,
        first_tokens=(),
        phases=Phases(),
        digests=b"".join(DIGESTS),
    )


def test_gifts_of_all_pushes_come_with_received_and_the_grant_is_over() -> None:
    table = granted()
    table.on_arrived(BlocksArrived(PREFILL, TICKET, 1, (0, 1), (), DIGESTS[:2], ((0, BlockId(3)),)), 0.1)
    table.on_message(PREFILL, done(), 0.2)
    last = BlocksArrived(PREFILL, TICKET, 1, (2,), (), DIGESTS[2:], ((2, BlockId(5)),))
    assert table.on_arrived(last, 0.3)[-1] == Received(TICKET, done(), {0: BlockId(3), 2: BlockId(5)})
    assert table.live_generations() == []


def test_grant_lives_until_no_write_can_follow() -> None:
    table = granted()
    table.cancel(TICKET, "cancelled", "not wanted", 0.1)
    assert table.live_generations() == [1]
    table.on_revoked(Revoked(PREFILL, TICKET), 0.2)
    assert table.live_generations() == []


def test_gifts_stand_for_granted_blocks_which_go_back() -> None:
    ledger = Ledger(memoryview(bytearray(ledger_bytes(SHARES))), SHARES)
    pools = {number: first_pool(ledger, number, 4) for number in (1, 2)}
    source, destination = (
        Ownership(ledger, pools[number], number, keep_prefix=False, number_of=NUMBERS.__getitem__) for number in (1, 2)
    )
    outgoing, table = pools[1].allocate(3), pools[2].allocate(3)
    pools[1].acquire(outgoing[1:2])  # another sequence reads it
    gone = source.hand_over(Candidates(outgoing, (), 0), "decode-0", 1)
    assert gone == {outgoing[0], outgoing[2]}
    before = list(table)
    destination.take_over(table, {0: outgoing[0], 2: outgoing[2]}, "prefill-0", 1)
    assert table == [outgoing[0], before[1], outgoing[2]]
    assert (source.num_given, destination.num_taken) == (2, 2)
    assert (source.settle().num_found, destination.settle().num_found) == (2, 0)
    check_conservation(ledger, pools, at_rest=True)
    assert [ledger.count(number) for number in (1, 2)] == ledger.counts() == [8, 8]
    with pytest.raises(ProtocolError, match="wanted"):
        destination.take_over(table, {1: BlockId(4)}, "prefill-0", 1)
    assert table == [outgoing[0], before[1], outgoing[2]]


def test_settle_asks_which_grants_live() -> None:
    ledger = Ledger(memoryview(bytearray(ledger_bytes(SHARES))), SHARES)
    pools = {number: first_pool(ledger, number, 4) for number in (1, 2)}
    source, destination = (Ownership(ledger, pools[number], number) for number in (1, 2))
    destination.live = lambda: [7]
    gift = pools[1].allocate(1)
    source.give(gift, 2, 7)
    assert destination.settle().num_found == 0
    destination.live = list
    assert destination.settle().num_found == 1
    with pytest.raises(ProtocolError, match="worker decode-0 has no number here"):
        source.hand_over(Candidates([], (), 0), "decode-0", 1)
    with pytest.raises(InternalError):
        source.give(gift, 2, 7)
