"""The transport on which nothing moves: what it checks in place of a copy, and with whom it connects."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.core.errors import ProtocolError, TransferFailed
from penstock.core.ids import BlockId, WorkerKey
from penstock.engine.kv_memory import KVMemory
from penstock.engine.ledger import Ledger, ledger_bytes
from penstock.kvtransfer.bulk import LinkFacts, Span, Unusable
from penstock.kvtransfer.transports.owner import OwnerBulk, OwnerTransport

SHARES = (4, 4)
P, D = 1, 2
FACTS = LinkFacts(WorkerKey("decode-0", "d" * 16), WorkerKey("prefill-0", "p" * 16), bytes(16), True, 0, 1.0)


@pytest.fixture
def memory() -> Iterator[KVMemory]:
    memory = KVMemory(sum(SHARES), 2, 16)
    memory.buffer[:] = bytes(range(256))
    yield memory
    memory.close()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(memoryview(bytearray(ledger_bytes(SHARES))), SHARES)


def spans(*block_ids: int, first_layer: int = 0, num_layers: int = 2) -> list[Span]:
    return [Span(block_id * 32 + first_layer * 16, num_layers * 16) for block_id in block_ids]


def test_given_blocks_stay_and_others_are_copied(memory: KVMemory, ledger: Ledger) -> None:
    ledger.give([BlockId(0), BlockId(1), BlockId(3)], P, D)
    bulk = OwnerBulk(memory, ledger, D, P)
    before = bytes(memory.buffer)
    bulk.send(spans(0, 1, 2, 3))
    bulk.receive(spans(0, 1, 3), spans(0, 1, 3), lambda: True)
    assert (bytes(memory.buffer), bulk.copied_bytes) == (before, 0)
    bulk.receive(spans(0, 1, 2, 3), spans(0, 1, 5, 3), lambda: True)
    assert (bytes(memory.block(5)), bulk.copied_bytes, bulk.refused) == (before[64:96], 32, 0)
    assert bytes(memory.buffer) == before[:160] + before[64:96] + before[192:]


def test_layers_of_a_block_are_copied_alone(memory: KVMemory, ledger: Ledger) -> None:
    bulk = OwnerBulk(memory, ledger, D, P)
    bulk.receive(spans(2, first_layer=1, num_layers=1), spans(6, first_layer=1, num_layers=1), lambda: True)
    assert memory.block(6) == bytes([*range(192, 208), *range(80, 96)])


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        ((0,), (0,), "block 0 is worker 1's, it must be worker 2's"),
        ((4,), (5,), "block 4 is worker 2's, it must be worker 1's"),
        ((0,), (1,), "block 1 is worker 1's, it must be worker 2's"),
        ((0, 1), (5, 3), "block 3 is worker 1's, it must be worker 2's"),
        ((8,), (5,), r"bytes \[256, 288\) of a memory of 256"),
        ((-1,), (5,), r"bytes \[-32, 0\) of a memory"),
        ((1 << 40,), (5,), "of a memory of 256"),
    ],
)
def test_span_of_a_block_with_another_owner_is_refused(
    memory: KVMemory, ledger: Ledger, source: tuple[int, ...], target: tuple[int, ...], why: str
) -> None:
    bulk = OwnerBulk(memory, ledger, D, P)
    with pytest.raises(ProtocolError, match=why):
        bulk.receive(spans(*source), spans(*target), lambda: True)
    assert bulk.refused == 1


def test_nothing_is_written_for_what_is_not_wanted_or_behind_the_end(memory: KVMemory, ledger: Ledger) -> None:
    bulk, before = OwnerBulk(memory, ledger, D, P), bytes(memory.buffer)
    bulk.receive(spans(0), spans(5), lambda: False)
    bulk.discard(spans(0))
    bulk.stop()
    bulk.stop()
    with pytest.raises(TransferFailed, match="the link is over"):
        bulk.receive(spans(0), spans(5), lambda: True)
    bulk.close()
    bulk.close()
    assert bytes(memory.buffer) == before


def test_owners_of_one_memory_connect_to_each_other(memory: KVMemory, ledger: Ledger) -> None:
    source, destination = (OwnerTransport(memory, ledger, number, "boot") for number in (P, D))
    bulk = destination.connect(FACTS, source.offer())
    assert isinstance(bulk, OwnerBulk)
    assert bulk.peer == P
    for transport in (source, destination):
        transport.close()


def test_any_other_offer_is_unusable(memory: KVMemory, ledger: Ledger) -> None:
    me = OwnerTransport(memory, ledger, D, "boot")
    other = KVMemory(8, 2, 16)
    for offer, why in (
        (OwnerTransport(other, ledger, P, "boot").offer(), "maps another memory"),
        (OwnerTransport(memory, ledger, P, "toob").offer(), "maps another memory"),
        (OwnerTransport(memory, ledger, P, "longer").offer(), "an offer of 30 bytes; one of this host has 28"),
        (me.offer(), "calls itself worker 2, this is 2"),
        (OwnerTransport(memory, ledger, 3, "boot").offer(), "calls itself worker 3"),
        (OwnerTransport(memory, ledger, 0, "boot").offer(), "calls itself worker 0"),
        (b"", "an offer of 0 bytes"),
    ):
        with pytest.raises(Unusable, match=why):
            me.connect(FACTS, offer)
    with pytest.raises(Unusable, match="no file of this host"):
        OwnerTransport(memory, ledger, D, "").offer()
    other.close()
