"""Blocks that change their size and their numbers' type on the way, over real links."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest
import torch

from penstock.core.errors import ProtocolError, TransferFailed
from penstock.core.ids import BlockId, SecureIds, Ticket, new_ticket
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.bulk import Span, Unusable
from penstock.kvtransfer.conversion import _SLOT_BYTES, _SLOTS, Decoder, Encoder, WireCodec
from penstock.kvtransfer.digest import no_digests
from penstock.kvtransfer.effects import AcceptBlocks, BlocksArrived, PeerLost, PeerUp, SendBlocks, Withdraw
from penstock.kvtransfer.push_sender import PushSender
from penstock.kvtransfer.staging import StagingArea
from penstock.kvtransfer.wire_format import AS_THEY_ARE, check_wire_dtype
from penstock.protocol.messages import Fingerprint, KvHello, Push, Role

from .conftest import FINGERPRINT, NUM_BLOCKS, TRANSPORTS, WAIT_S, Cluster, Handmade, Worker
from .test_push_sender import PEER, Left, RecordingBulk

STAGING_BYTES = (_SLOTS + 1) * _SLOT_BYTES + 4096  # for one link both ways, and where the blocks end
TICKET = Ticket(b"t" * 16)
NUM_TOKENS = 41
POISON = 0xDD
FORMATS = [
    (("float32", 4), ("float32", 8)),
    (("float32", 8), ("float32", 4)),
    (("float32", 4), ("bfloat16", 4)),
    (("bfloat16", 4), ("float32", 16)),
    (("float16", 3), ("float32", 4)),
    (("bfloat16", 5), ("bfloat16", 2)),
    (("float16", 16), ("bfloat16", 2)),
    (("bfloat16", 4), ("float16", 6)),
]


def in_format(dtype: str, block_size: int) -> Fingerprint:
    return msgspec.structs.replace(FINGERPRINT, dtype=dtype, block_size=block_size, num_kv_heads=2)


def pool_of(worker: Worker, fingerprint: Fingerprint) -> torch.Tensor:
    """[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], a copy."""
    f = fingerprint
    flat = torch.frombuffer(bytearray(worker.memory.buffer), dtype=getattr(torch, f.dtype))
    return flat.view(NUM_BLOCKS, f.num_layers, 2, f.block_size, f.num_kv_heads, f.head_dim)


def tokens_of(pool: torch.Tensor, table: list[int], num_tokens: int) -> torch.Tensor:
    """[num_layers, 2, num_tokens, num_kv_heads, head_dim] as the sequence with these blocks reads it."""
    kv = pool[table].movedim(0, 2).flatten(2, 3)
    return kv[:, :, :num_tokens]


class Pair:
    """A linked pair whose caches differ; the source's pool is random, the destination's poison."""

    def __init__(
        self,
        cluster: Cluster,
        transports: tuple[str, ...],
        source: tuple[str, int],
        target: tuple[str, int],
        wire_dtype: str = "lossless",
    ) -> None:
        self.formats = in_format(*source), in_format(*target)
        roles: tuple[Role, Role] = ("prefill", "decode")
        self.prefill, self.decode = (
            cluster.worker(role, role, transports, form, staging_bytes=STAGING_BYTES, wire_dtype=wire_dtype)
            for role, form in zip(roles, self.formats, strict=True)
        )
        cluster.introduce()
        for worker in (self.prefill, self.decode):
            worker.wait_for(PeerUp)
        self.rng = random.Random(1)
        values = torch.randn(NUM_BLOCKS * self.prefill.memory.block_bytes, generator=torch.Generator().manual_seed(2))
        data = values.to(getattr(torch, source[0])).view(torch.uint8).numpy().tobytes()
        self.prefill.memory.buffer[:] = data[: self.prefill.memory.nbytes]
        self.decode.memory.buffer[:] = bytes([POISON]) * self.decode.memory.nbytes
        self.slots = self.rng.sample(range(NUM_BLOCKS), -(-NUM_TOKENS // source[1]))
        self.table = self.rng.sample(range(NUM_BLOCKS), -(-NUM_TOKENS // target[1]))

    def hand_over(self, ticket: Ticket, first: int = 0) -> None:
        """All ordinals from `first` on, in pushes of some blocks and some layers."""
        blocks = tuple(map(BlockId, self.table))
        stop = len(self.slots)
        self.decode.mesh.perform(AcceptBlocks(self.prefill.key, ticket, 1, first, stop, blocks, NUM_TOKENS))
        at = first
        while at < stop:
            count = self.rng.randint(1, stop - at)
            ordinals = tuple(range(at, at + count))
            at += count
            self._push(ticket, ordinals)
        waiting = set(range(first, stop))
        while waiting:
            event = self.decode.wait_for(BlocksArrived)
            assert isinstance(event, BlocksArrived)
            assert event.corrupt == ()
            waiting -= set(event.ordinals)

    def _push(self, ticket: Ticket, ordinals: tuple[int, ...]) -> None:
        ids = tuple(BlockId(self.slots[ordinal]) for ordinal in ordinals)
        cut = self.rng.choice([FINGERPRINT.num_layers, 1, 2])
        for layer, count in ((0, cut), (cut, FINGERPRINT.num_layers - cut)):
            if count:
                effect = SendBlocks(self.decode.key, ticket, 1, ordinals, ids, layer, count)
                self.prefill.mesh.perform(effect)

    @property
    def sent(self) -> torch.Tensor:
        return tokens_of(pool_of(self.prefill, self.formats[0]), self.slots, NUM_TOKENS)

    @property
    def found(self) -> torch.Tensor:
        return tokens_of(pool_of(self.decode, self.formats[1]), self.table, NUM_TOKENS)


def untouched(pair: Pair, table: list[int], num_tokens: int) -> None:
    """Every byte outside these tokens is as it was."""
    f = pair.formats[1]
    raw = torch.frombuffer(bytearray(pair.decode.memory.buffer), dtype=torch.uint8)
    view = raw.view(NUM_BLOCKS, f.num_layers, 2, f.block_size, -1).clone()
    for at in range(num_tokens):
        block, slot = divmod(at, f.block_size)
        view[table[block], :, :, slot] = POISON
    assert bool((view == POISON).all())


@pytest.mark.parametrize("transports", TRANSPORTS)
@pytest.mark.parametrize(("source", "target"), FORMATS)
def test_every_token_arrives_in_the_other_caches_format_and_nothing_else_changes(
    cluster: Cluster, transports: tuple[str, ...], source: tuple[str, int], target: tuple[str, int]
) -> None:
    pair = Pair(cluster, transports, source, target)
    pair.hand_over(new_ticket(SecureIds()))
    assert torch.equal(pair.found, pair.sent.to(pair.found.dtype))
    untouched(pair, pair.table, NUM_TOKENS)


@pytest.mark.parametrize(("source", "target"), [(("float32", 4), ("float32", 8)), (("float32", 8), ("bfloat16", 4))])
def test_held_blocks_are_not_written(cluster: Cluster, source: tuple[str, int], target: tuple[str, int]) -> None:
    """The first eight tokens are here already, in blocks that others may read."""
    pair = Pair(cluster, ("tcp",), source, target)
    pair.hand_over(new_ticket(SecureIds()), first=8 // source[1])
    assert torch.equal(pair.found[:, :, 8:], pair.sent.to(pair.found.dtype)[:, :, 8:])
    held = pair.table[: 8 // target[1]]
    assert bytes([POISON]) * len(held) * pair.decode.memory.block_bytes == b"".join(
        bytes(pair.decode.memory.block(block)) for block in held
    )


@pytest.mark.parametrize("wire_dtype", ["int8", "fp8_e4m3", "bfloat16"])
def test_narrower_wire_is_taken_where_it_is_asked_for(cluster: Cluster, wire_dtype: str) -> None:
    pair = Pair(cluster, ("shm", "tcp"), ("float32", 4), ("float32", 4), wire_dtype)
    pair.hand_over(new_ticket(SecureIds()))
    assert not torch.equal(pair.found, pair.sent)
    highest = pair.sent.abs().max()
    assert float((pair.found - pair.sent).abs().max()) < {"int8": 0.005, "fp8_e4m3": 0.04, "bfloat16": 0.005}[
        wire_dtype
    ] * float(highest)


def test_many_pushes_go_through_the_few_staging_slots(cluster: Cluster) -> None:
    """A slot is used again when the destination has taken it: three of them carry any number of pushes."""
    pair = Pair(cluster, ("tcp",), ("float32", 4), ("bfloat16", 4))
    for _ in range(20):
        pair.hand_over(new_ticket(SecureIds()))
        assert torch.equal(pair.found, pair.sent.to(torch.bfloat16))


def test_workers_of_one_format_exchange_blocks_as_they_are(cluster: Cluster) -> None:
    pair = Pair(cluster, ("tcp",), ("bfloat16", 4), ("bfloat16", 4))
    pair.hand_over(new_ticket(SecureIds()))
    assert torch.equal(pair.found, pair.sent)
    assert not any(pair.decode.memory.region[-_SLOT_BYTES : -_SLOT_BYTES + 1000])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"staged": 0}, "not in the peer's staging memory"),
        ({"staged": None, "source_slots": [0, 1]}, "another wire format"),
        ({"ordinals": [0, 2]}, "not neighbours"),
        ({"ordinals": [1, 0]}, "not neighbours"),
        ({"staged": 1 << 40}, "not in the peer's staging memory"),
    ],
)
def test_converted_push_that_no_honest_peer_sends_ends_the_link_without_a_write(
    cluster: Cluster, changes: dict[str, Any], match: str
) -> None:
    form = in_format("float32", 4)
    worker = cluster.worker("both", "both-1", ("shm",), form, staging_bytes=STAGING_BYTES)
    block_bytes = worker.memory.block_bytes
    hand = Handmade.link(
        worker, wire_dtype="float32", fingerprint=form, block_bytes=block_bytes, staging_bytes=STAGING_BYTES
    )
    fields: dict[str, Any] = {"ordinals": [0, 1], "digests": bytes(16), "staged": NUM_BLOCKS * block_bytes}
    hand.send(Push(b"t" * 16, 1, 0, 3, **(fields | changes)))
    lost = worker.wait_for(PeerLost)
    assert isinstance(lost, PeerLost)
    assert match in lost.reason
    assert not any(worker.memory.buffer)
    hand.sock.close()


# ---- staging slots ----


class PlainCodec:
    """In place of a codec: wire layers of 100 bytes, and nothing is written."""

    layer_bytes = 100

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory
        self.encoded: list[int] = []

    def encode(self, block_ids: tuple[BlockId, ...], first_layer: int, num_layers: int, offset: int) -> None:
        self.encoded.append(offset)

    def view(self, offset: int, nbytes: int) -> memoryview:
        return self._memory.region[offset : offset + nbytes]


class Slots:
    def __init__(self) -> None:
        self.memory = KVMemory(8, 3, 64, STAGING_BYTES)
        self.staging = StagingArea(self.memory)
        self.codec = PlainCodec(self.memory)
        self.encoder = Encoder(cast(WireCodec, self.codec), self.staging)
        self.hello = KvHello("p", "a" * 16, None, FINGERPRINT, ["tcp"], "", 8, 192, bytes(16), STAGING_BYTES)

    def close(self) -> None:
        self.encoder.close()
        self.memory.close()


def effect(count: int = 2, ticket: Ticket = TICKET) -> SendBlocks:
    """All layers of the first blocks."""
    return SendBlocks(PEER, ticket, 1, tuple(range(count)), tuple(map(BlockId, range(count))), 0, 3)


def test_encoder_waits_for_a_slot_until_the_oldest_push_is_taken() -> None:
    slots = Slots()
    spans = [slots.encoder.encode(effect()) for _ in range(_SLOTS)]
    assert len({span.offset for span in spans}) == _SLOTS
    assert all(span.nbytes == 600 for span in spans)
    found: list[Span] = []
    thread = threading.Thread(target=lambda: found.append(slots.encoder.encode(effect())))
    thread.start()
    assert found == []
    slots.encoder.taken()
    thread.join()
    assert found == [spans[0]]
    slots.close()


def test_encoder_that_waits_is_released_by_stop() -> None:
    slots = Slots()
    for _ in range(_SLOTS):
        slots.encoder.encode(effect())
    raised: list[Exception] = []

    def encode() -> None:
        try:
            slots.encoder.encode(effect())
        except TransferFailed as err:
            raised.append(err)

    thread = threading.Thread(target=encode)
    thread.start()
    slots.encoder.stop()
    thread.join()
    assert len(raised) == 1
    slots.close()


def test_encoder_refuses_what_no_slot_holds_and_a_push_taken_that_was_not_sent() -> None:
    slots = Slots()
    with pytest.raises(TransferFailed, match="does not fit a staging slot"):
        slots.encoder.encode(effect(_SLOT_BYTES // 300 + 1))
    with pytest.raises(ProtocolError, match="not sent"):
        slots.encoder.taken()
    slots.close()


def test_push_that_is_withdrawn_while_it_is_encoded_gives_its_slot_back() -> None:
    """Else a few of them would leave the link without a slot, and its thread waiting for ever."""
    slots, left = Slots(), queue.SimpleQueue[Left]()
    reached, go = threading.Semaphore(0), threading.Semaphore(0)

    def digests_at(region: memoryview, places: Sequence[tuple[int, int]]) -> bytes:
        reached.release()
        assert go.acquire(timeout=WAIT_S)
        return no_digests(region, places)

    sender = PushSender(slots.memory, RecordingBulk(left), slots.encoder, left.put, digests_at)
    thread = threading.Thread(target=sender.run)
    thread.start()
    try:
        for number in range(2 * _SLOTS):
            ticket = Ticket(bytes([number]) * 16)
            sender.put(effect(1, ticket))
            assert reached.acquire(timeout=WAIT_S)
            sender.withdraw(Withdraw(PEER, ticket))
            go.release()
        sender.put(effect(1))
        assert reached.acquire(timeout=WAIT_S)
        go.release()
        told = left.get(timeout=WAIT_S)
    finally:
        sender.stop()
        go.release()
        thread.join()
        slots.close()
    assert isinstance(told, Push)
    assert (told.ticket, told.staged) == (b"t" * 16, slots.codec.encoded[-1])


def test_staging_memory_is_shared_by_links_and_comes_back() -> None:
    slots, codec = Slots(), cast(WireCodec, PlainCodec(KVMemory(1, 1, 64)))
    with pytest.raises(Unusable, match="staging memory"):
        Encoder(codec, slots.staging)
    decoder = Decoder(codec, slots.staging, slots.hello)
    with pytest.raises(Unusable, match="staging memory"):
        Decoder(codec, slots.staging, slots.hello)
    slots.encoder.close()
    Decoder(codec, slots.staging, slots.hello).close()
    decoder.close()
    Encoder(codec, slots.staging).close()
    slots.close()


# ---- what may travel between two formats ----


@pytest.mark.parametrize(
    ("mine", "theirs", "wire_dtype", "fits"),
    [
        (("float32", 4), ("float32", 4), AS_THEY_ARE, True),
        (("float32", 4), ("float32", 8), AS_THEY_ARE, False),
        (("float32", 4), ("bfloat16", 4), AS_THEY_ARE, False),
        (("float32", 4), ("bfloat16", 8), "bfloat16", True),
        (("float32", 4), ("float32", 4), "int8", True),
        (("float32", 4), ("float32", 4), "float64", False),
        (("f4", 4), ("f4", 4), AS_THEY_ARE, True),
        (("f4", 4), ("f4", 4), "float32", False),
    ],
)
def test_wire_dtype_fits_two_formats_or_is_refused(
    mine: tuple[str, int], theirs: tuple[str, int], wire_dtype: str, fits: bool
) -> None:
    if fits:
        check_wire_dtype(in_format(*mine), in_format(*theirs), wire_dtype)
    else:
        with pytest.raises(ProtocolError, match=f"wire_dtype {wire_dtype!r} cannot carry"):
            check_wire_dtype(in_format(*mine), in_format(*theirs), wire_dtype)
