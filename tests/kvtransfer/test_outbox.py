"""The queue in front of a link's writer."""

from __future__ import annotations

from penstock.core.ids import BlockId, Ticket, WorkerKey
from penstock.kvtransfer.effects import SendBlocks
from penstock.kvtransfer.outbox import Outbox
from penstock.protocol.messages import Done, Failed, KvPing, Offer, Phases

MINE, OTHER = Ticket(b"m" * 16), Ticket(b"o" * 16)
PEER = WorkerKey("decode-0", "d" * 16)


def blocks(ticket: Ticket) -> SendBlocks:
    return SendBlocks(PEER, ticket, 1, (0,), (BlockId(0),))


def done(ticket: Ticket) -> Done:
    return Done(ticket=ticket, generation=1, num_blocks=1, num_tokens=1, first_tokens=(), phases=Phases())


def test_failed_withdraws_queued_blocks_and_done_of_its_ticket_only() -> None:
    """The source's blocks are reused from now on: a Done that follows would vouch for another request's bytes."""
    outbox, failed = Outbox(10), Failed(ticket=MINE, code="lease_expired", message="")
    offer = Offer(ticket=MINE, num_tokens=1, num_blocks=1)
    for item in (offer, blocks(MINE), blocks(OTHER), done(MINE), done(OTHER), failed):
        assert outbox.put(item)
    assert [outbox.take(0.0) for _ in range(5)] == [offer, blocks(OTHER), done(OTHER), failed, None]


def test_put_at_the_bound_is_refused() -> None:
    outbox = Outbox(2)
    assert [outbox.put(KvPing()) for _ in range(3)] == [True, True, False]


def test_closed_outbox_swallows_everything() -> None:
    outbox = Outbox(1)
    outbox.put(KvPing())
    outbox.close()
    assert outbox.take(60.0) is None
    assert outbox.put(KvPing())
    assert outbox.put(KvPing())
