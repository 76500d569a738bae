"""The queue in front of a link's sending threads."""

from __future__ import annotations

import threading

from penstock.core.ids import BlockId, Ticket, WorkerKey
from penstock.kvtransfer.effects import SendBlocks
from penstock.kvtransfer.outbox import Outbox
from penstock.protocol.messages import Done, HandoffMessage, KvPing, Phases

MINE, OTHER = Ticket(b"m" * 16), Ticket(b"o" * 16)
PEER = WorkerKey("decode-0", "d" * 16)


def blocks(ticket: Ticket) -> SendBlocks:
    return SendBlocks(PEER, ticket, 1, (0,), (BlockId(0),), 0, 1)


def done(ticket: Ticket) -> Done:
    return Done(ticket=ticket, generation=1, num_blocks=1, num_tokens=1, first_tokens=(), phases=Phases())


def test_drop_takes_out_queued_blocks_and_done_of_one_ticket_only() -> None:
    """The source's blocks are reused from now on: a Done that follows would vouch for another request's bytes."""
    outbox: Outbox[SendBlocks | Done] = Outbox(10)
    for item in (blocks(MINE), blocks(OTHER), done(MINE), done(OTHER)):
        assert outbox.put(item)
    outbox.drop(lambda item: item.ticket == MINE)
    assert [outbox.take(0.0) for _ in range(3)] == [blocks(OTHER), done(OTHER), None]


def test_put_at_the_bound_is_refused_and_room_comes_back() -> None:
    outbox: Outbox[HandoffMessage] = Outbox(2)
    assert [outbox.put(KvPing()) for _ in range(3)] == [True, True, False]
    assert outbox.take(0.0) == KvPing()
    assert outbox.put(KvPing())


def test_take_waits_for_what_another_thread_puts() -> None:
    outbox: Outbox[HandoffMessage] = Outbox(1)
    found: list[HandoffMessage | None] = []
    thread = threading.Thread(target=lambda: found.append(outbox.take()))
    thread.start()
    outbox.put(KvPing())
    thread.join()
    assert found == [KvPing()]


def test_closed_outbox_swallows_everything_and_wakes_who_waits() -> None:
    outbox: Outbox[HandoffMessage] = Outbox(1)
    outbox.put(KvPing())
    outbox.close()
    assert outbox.take(60.0) is None
    assert outbox.put(KvPing())
    assert outbox.put(KvPing())
    assert outbox.take() is None
