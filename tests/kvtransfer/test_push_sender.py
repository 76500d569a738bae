"""The source's bulk thread: what leaves, in which order, and what does not once a ticket is withdrawn."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from penstock.core.ids import BlockId, Ticket, WorkerKey
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer import socket_link
from penstock.kvtransfer.bulk import Bulk, Span
from penstock.kvtransfer.digest import Digests, block_digest, combined_digest, digests
from penstock.kvtransfer.effects import BlocksArrived, MessageArrived, SendBlocks, SendMessage, Withdraw
from penstock.kvtransfer.push_sender import PushSender, layers_span
from penstock.kvtransfer.vouching import Vouchers
from penstock.protocol.messages import Ack, Cancel, Done, Phases, Push

from .conftest import TRANSPORTS, WAIT_S, Cluster, accept, push

PEER = WorkerKey("decode-0", "d" * 16)
MINE, OTHER = Ticket(b"m" * 16), Ticket(b"o" * 16)
NUM_LAYERS = 3
Left = Push | Done | tuple[Span, ...]


class RecordingBulk(Bulk):
    """Notes which bytes were to be sent."""

    quarantine_s = 0.0
    in_parts = True

    def __init__(self, left: queue.SimpleQueue[Left]) -> None:
        self._left = left

    def send(self, spans: Sequence[Span]) -> None:
        self._left.put(tuple(spans))

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> None:
        raise AssertionError("a sender receives nothing")

    def discard(self, source: Sequence[Span]) -> None:
        raise AssertionError("a sender receives nothing")

    def stop(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is held."""


class Gate:
    """A digest that waits: what happens meanwhile happens between the look at the bytes and their leaving."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Semaphore(0), threading.Event()

    def __call__(self, region: memoryview, places: Sequence[tuple[int, int]]) -> bytes:
        found = digests(region, places)
        self.reached.release()
        assert self.opened.wait(WAIT_S)
        return found


class Bench:
    def __init__(self, digests_at: Digests) -> None:
        self.memory = KVMemory(8, NUM_LAYERS, 64)
        self.memory.buffer[:] = random.Random(3).randbytes(self.memory.nbytes)
        self.left: queue.SimpleQueue[Left] = queue.SimpleQueue()
        self.sender = PushSender(self.memory, RecordingBulk(self.left), None, self.left.put, digests_at)

    def send(self, ticket: Ticket, ordinals: tuple[int, ...], layers: tuple[int, int] = (0, NUM_LAYERS)) -> None:
        blocks = tuple(BlockId(ordinal + 2) for ordinal in ordinals)
        assert self.sender.put(SendBlocks(PEER, ticket, 1, ordinals, blocks, *layers))

    def done(self, ticket: Ticket, num_blocks: int) -> None:
        assert self.sender.put(Done(ticket, 1, num_blocks, 4 * num_blocks, (), Phases()))

    def next(self) -> Left:
        return self.left.get(timeout=WAIT_S)

    def digest_of(self, ordinal: int, *pieces: tuple[int, int]) -> bytes:
        views = ((first, count, self.memory.block(ordinal + 2, first, count)) for first, count in pieces)
        return combined_digest((first, count, block_digest(view)) for first, count, view in views)


@contextmanager
def running(digests_at: Digests = digests) -> Iterator[Bench]:
    bench = Bench(digests_at)
    thread = threading.Thread(target=bench.sender.run)
    thread.start()
    try:
        yield bench
    finally:
        bench.sender.stop()
        if isinstance(digests_at, Gate):
            digests_at.opened.set()
        thread.join()
        bench.sender.close()
        bench.memory.close()


def test_push_is_told_before_its_bytes_and_done_last_with_a_digest_of_every_block() -> None:
    with running() as bench:
        bench.send(MINE, (1, 2), (0, 1))
        bench.send(MINE, (1, 2), (1, 2))
        bench.send(MINE, (3,))
        bench.done(MINE, 3)
        for ordinals, layers in (((1, 2), (0, 1)), ((1, 2), (1, 2)), ((3,), (0, 3))):
            told = bench.next()
            assert isinstance(told, Push)
            assert (tuple(told.ordinals), told.first_layer, told.num_layers) == (ordinals, *layers)
            assert told.source_slots == [ordinal + 2 for ordinal in ordinals]
            views = [bench.memory.block(ordinal + 2, *layers) for ordinal in ordinals]
            assert told.digests == b"".join(map(block_digest, views))
            blocks = [BlockId(ordinal + 2) for ordinal in ordinals]
            assert bench.next() == tuple(layers_span(bench.memory, block, *layers) for block in blocks)
        done = bench.next()
        assert isinstance(done, Done)
        halves = [bench.digest_of(ordinal, (0, 1), (1, 2)) for ordinal in (1, 2)]
        assert done.digests == b"".join([*halves, bench.digest_of(3, (0, 3))])


def test_withdrawn_ticket_sends_nothing_that_waits_and_the_others_go_on() -> None:
    gate = Gate()
    with running(gate) as bench:
        bench.send(OTHER, (0,))
        assert gate.reached.acquire(timeout=WAIT_S)
        bench.send(MINE, (1,))
        bench.done(MINE, 1)
        bench.send(OTHER, (2,))
        bench.done(OTHER, 2)
        bench.sender.withdraw(Withdraw(PEER, MINE))
        gate.opened.set()
        tickets = [item.ticket for item in (bench.next() for _ in range(5)) if not isinstance(item, tuple)]
        assert tickets == [OTHER] * 3
        assert bench.left.empty()


def test_digest_taken_while_the_ticket_is_withdrawn_goes_nowhere() -> None:
    """The worker may write to the block again: neither its digest nor its bytes leave."""
    gate = Gate()
    with running(gate) as bench:
        bench.send(MINE, (1, 2))
        assert gate.reached.acquire(timeout=WAIT_S)
        bench.sender.withdraw(Withdraw(PEER, MINE))
        gate.opened.set()
        bench.send(OTHER, (3,))
        first = bench.next()
        assert isinstance(first, Push)
        assert first.ticket == OTHER


def test_done_of_a_withdrawn_ticket_vouches_for_nothing_that_went_before() -> None:
    """A Done that was already taken off the queue, or comes late, cannot name digests any more."""
    with running() as bench:
        bench.send(MINE, (1,))
        assert isinstance(bench.next(), Push)
        assert isinstance(bench.next(), tuple)
        bench.sender.withdraw(Withdraw(PEER, MINE))
        bench.done(MINE, 1)
        bench.send(OTHER, (2,))
        late, told = bench.next(), bench.next()
        assert isinstance(late, Done)
        assert late.digests == b""
        assert isinstance(told, Push)
        assert bench.sender._withdrawn == set()
        assert len(bench.sender._vouchers) == 1


def test_many_withdrawals_leave_nothing_behind() -> None:
    with running() as bench:
        for number in range(200):
            ticket = Ticket(number.to_bytes(16, "big"))
            bench.send(ticket, (1,))
            bench.sender.withdraw(Withdraw(PEER, ticket))
        bench.send(OTHER, (2,))
        while (item := bench.next()) and not (isinstance(item, Push) and item.ticket == OTHER):
            continue
        assert bench.sender._withdrawn == set()
        assert len(bench.sender._vouchers) == 1


def test_vouchers_name_blocks_in_the_order_of_ordinals_however_they_went() -> None:
    vouchers = Vouchers()
    for ordinals, first, count in (((4, 2), 2, 1), ((2,), 0, 2), ((3,), 0, 3), ((4,), 0, 2)):
        digests = b"".join(bytes([ordinal, first]) * 4 for ordinal in ordinals)
        vouchers.note(Push(MINE, 1, first, count, list(ordinals), digests, list(ordinals)))

    def whole(ordinal: int) -> bytes:
        return combined_digest([(0, 2, bytes([ordinal, 0]) * 4), (2, 1, bytes([ordinal, 2]) * 4)])

    done = vouchers.complete(Done(MINE, 1, 3, 20, (), Phases()))
    assert done.digests == whole(2) + combined_digest([(0, 3, bytes([3, 0]) * 4)]) + whole(4)
    assert vouchers.complete(Done(OTHER, 1, 0, 20, (), Phases())).digests == b""
    vouchers.forget(MINE)
    vouchers.forget(MINE)
    assert len(vouchers) == 0


@pytest.mark.parametrize("transports", TRANSPORTS)
def test_blocks_reused_after_withdraw_never_arrive_as_the_old_tickets(
    cluster: Cluster, transports: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over sockets, with the source's thread held between the digest and the push: decode hears of the end alone."""
    gate = Gate()

    def digests_at(region: memoryview, places: Sequence[tuple[int, int]]) -> bytes:
        at_source = threading.current_thread().name.startswith("kv-send")
        return gate(region, places) if at_source else digests(region, places)

    monkeypatch.setattr(socket_link, "digests", digests_at)
    prefill, decode = cluster.pair(transports)
    accept(decode, prefill, MINE, [0, 1])
    accept(decode, prefill, OTHER, [2])
    push(prefill, decode, MINE, [8, 9])
    assert gate.reached.acquire(timeout=WAIT_S)
    prefill.mesh.perform(SendMessage(decode.key, Cancel(MINE, "cancelled", "")))
    prefill.mesh.perform(Withdraw(decode.key, MINE))
    prefill.memory.block(8)[:] = b"x" * len(prefill.memory.block(8))  # another request's
    gate.opened.set()
    push(prefill, decode, OTHER, [10])
    prefill.mesh.perform(SendMessage(decode.key, Ack(OTHER, 1)))
    events = [decode.events.get(timeout=WAIT_S) for _ in range(3)]
    assert [event.ticket for event in events if isinstance(event, BlocksArrived)] == [OTHER]
    assert {type(e.message) for e in events if isinstance(e, MessageArrived)} == {Cancel, Ack}
    assert not any(byte for block in (0, 1) for byte in decode.memory.block(block))
    assert decode.mesh.refused_pushes == 0
