"""The small parts under the links: digests, spans, addresses, what moves bytes, staging memory, rendezvous."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from penstock.core.errors import ProtocolError, TransferFailed
from penstock.core.ids import BlockId, SeededIds
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.bulk import Bulk, Span, Unusable
from penstock.kvtransfer.digest import DIGEST_BYTES, block_digest
from penstock.kvtransfer.linking import dials
from penstock.kvtransfer.push_sender import layers_span
from penstock.kvtransfer.staging import StagingArea
from penstock.kvtransfer.transports.address import KvAddress
from penstock.kvtransfer.transports.runs import merged, paired, total_bytes
from penstock.kvtransfer.transports.shm import MappedPool, ShmBulk
from penstock.kvtransfer.transports.tcp import Rendezvous, TcpBulk
from penstock.protocol.messages import Peer, Role


def test_digest_of_known_bytes_is_xxh3() -> None:
    assert block_digest(memoryview(b"")).hex() == "2d06800538d394c2"  # published test vector of XXH3-64, seed 0
    assert len(block_digest(memoryview(b"x"))) == DIGEST_BYTES


def test_every_single_flipped_bit_changes_the_digest() -> None:
    data = bytearray(random.Random(1).randbytes(256))
    good = block_digest(memoryview(data))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert block_digest(memoryview(data)) != good
        data[bit // 8] ^= 1 << bit % 8


def test_merged_joins_neighbours_and_nothing_else() -> None:
    spans = [Span(0, 4), Span(4, 2), Span(8, 1), Span(7, 1), Span(8, 4)]
    assert merged(spans) == [Span(0, 6), Span(8, 1), Span(7, 5)]
    assert merged([]) == []
    assert total_bytes(spans) == 12


def test_paired_cuts_where_either_side_ends_and_at_the_bound() -> None:
    source, target = [Span(0, 10), Span(20, 6)], [Span(100, 4), Span(104, 8), Span(200, 4)]
    assert list(paired(source, target, 1000)) == [(0, 100, 10), (20, 110, 2), (22, 200, 4)]
    assert list(paired(source, target, 4)) == [
        (0, 100, 4), (4, 104, 4), (8, 108, 2), (20, 110, 2), (22, 200, 4),
    ]  # fmt: skip
    assert list(paired([], [], 4)) == []


def test_paired_of_different_totals_is_refused() -> None:
    with pytest.raises(ValueError, match="10 bytes into 9"):
        list(paired([Span(0, 10)], [Span(5, 9)], 4))
    with pytest.raises(ValueError, match="0 bytes into 9"):
        list(paired([], [Span(5, 9)], 4))


def test_paired_of_random_spans_moves_every_byte_to_its_place() -> None:
    rng = random.Random(12)
    for _ in range(200):
        total = rng.randint(1, 60)
        source, target = _random_spans(rng, total), _random_spans(rng, total)
        moved: list[tuple[int, int]] = []
        for start, stop, nbytes in paired(source, target, rng.choice([1, 3, 7, 100])):
            moved += zip(range(start, start + nbytes), range(stop, stop + nbytes), strict=True)
        assert moved == list(zip(_offsets(source), _offsets(target), strict=True))


def _random_spans(rng: random.Random, total: int) -> list[Span]:
    cuts = sorted({0, total, *(rng.randrange(total) for _ in range(rng.randint(0, 5)))})
    return [
        Span(rng.choice([start, 1000 * at]), stop - start) for at, (start, stop) in enumerate(itertools.pairwise(cuts))
    ]


def _offsets(spans: list[Span]) -> list[int]:
    return [at for offset, nbytes in spans for at in range(offset, offset + nbytes)]


@pytest.mark.parametrize(
    "address",
    [
        KvAddress("/run/kv.sock", ("127.0.0.1", 41231)),
        KvAddress("/run/a,b/kv.sock", ("::1", 1)),
        KvAddress("/run/kv.sock", None),
        KvAddress(None, ("127.0.0.1", 5)),
    ],
)
def test_address_reads_what_it_writes(address: KvAddress) -> None:
    assert KvAddress.parse(str(address)) == address


@pytest.mark.parametrize("text", ["", "http://x", "unix:", "tcp:host", "tcp:h:99x", "inproc:a"])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="expected unix:PATH,tcp:HOST:PORT"):
        KvAddress.parse(text)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("decode", "prefill", True),
        ("decode", "both", True),
        ("both", "prefill", True),
        ("both", "both", True),  # worker a and worker b
        ("prefill", "decode", False),
        ("prefill", "prefill", False),
        ("decode", "decode", False),
        ("both", "decode", False),
    ],
)
def test_exactly_one_side_dials(one: Role, other: Role, expected: bool) -> None:
    def peer(worker_id: str, role: Role) -> Peer:
        return Peer(worker_id=worker_id, epoch="0" * 16, role=role, kv_address="")

    assert dials(one, "a", peer("b", other)) is expected
    assert not (dials(one, "a", peer("b", other)) and dials(other, "b", peer("a", one)))
    assert not dials(one, "a", peer("a", other))


class Ends:
    """Both ends of one transport, over two memories with staging behind the blocks."""

    def __init__(self, kind: str, staging_bytes: int = 4096) -> None:
        self.source, self.target = (KVMemory(8, 4, 16, staging_bytes) for _ in range(2))
        self._threads: list[threading.Thread] = []
        self.source.region[:] = random.Random(2).randbytes(len(self.source.region))
        if kind == "shm":
            fd = self.source.fileno()
            assert fd is not None
            pool = MappedPool(os.dup(fd), len(self.source.region))
            self.sender, self.receiver = ShmBulk(self.source, None), ShmBulk(self.target, pool)
        else:
            left, right = socket.socketpair()
            self.sender, self.receiver = TcpBulk(self.source, left), TcpBulk(self.target, right)

    sender: Bulk
    receiver: Bulk

    def send_apart(self, spans: list[Span]) -> None:
        """On a thread of its own, for more bytes than lie in a socket."""
        self._threads.append(threading.Thread(target=self.sender.send, args=(spans,)))
        self._threads[-1].start()

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        for bulk in (self.sender, self.receiver):
            bulk.stop()
            bulk.close()
            bulk.close()
        self.source.close()
        self.target.close()


@pytest.fixture(params=["shm", "tcp"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    with contextlib.closing(Ends(request.param)) as ends:
        yield ends


def test_bulk_moves_layers_of_blocks_and_staging_and_nothing_else(ends: Ends) -> None:
    source = [layers_span(ends.source, BlockId(block), 1, 3) for block in (3, 4)] + [Span(512 + 100, 50)]
    target = [layers_span(ends.target, BlockId(block), 1, 3) for block in (6, 7)] + [Span(512 + 4000, 50)]
    ends.sender.send(source)
    ends.receiver.receive(source, target, lambda: True)
    for slot, block in ((3, 6), (4, 7)):
        assert ends.target.block(block, 1, 3) == ends.source.block(slot, 1, 3)
        assert not any(ends.target.block(block, 0, 1))
    assert ends.target.region[4512:4562] == ends.source.region[612:662]
    assert sum(map(bool, ends.target.region)) <= 2 * 48 + 50


def test_bulk_stays_in_step_after_what_is_not_wanted_or_discarded(ends: Ends) -> None:
    one, two, three = ([layers_span(ends.source, BlockId(block), 0, 4)] for block in range(3))
    for spans in (one, two, three):
        ends.sender.send(spans)
    ends.receiver.discard(one)
    ends.receiver.receive(two, [Span(0, 64)], lambda: False)
    assert not any(ends.target.region)
    ends.receiver.receive(three, [Span(64, 64)], lambda: True)
    assert ends.target.block(1) == ends.source.block(2)


def test_bulk_that_is_stopped_fails_soon(ends: Ends) -> None:
    spans = [Span(0, 64)]
    ends.receiver.stop()
    ends.receiver.stop()
    with pytest.raises((OSError, TransferFailed)):
        ends.receiver.receive(spans, spans, lambda: True)


def test_shm_without_a_pool_receives_nothing() -> None:
    memory = KVMemory(1, 1, 64)
    with pytest.raises(ProtocolError, match="passed none"):
        ShmBulk(memory, None).receive([Span(0, 64)], [Span(0, 64)], lambda: True)
    memory.close()


def test_descriptor_that_is_no_sealed_pool_is_refused() -> None:
    """A reader of a file that shrinks dies with SIGBUS; so it is not mapped at all."""
    for nbytes in (4096, 8192):
        fd = os.memfd_create("not-sealed")
        os.ftruncate(fd, nbytes)
        with pytest.raises(ProtocolError, match="sealed pool"):
            MappedPool(fd, 4096)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_pool_of_another_size_than_the_hello_says_is_refused() -> None:
    memory = KVMemory(4, 1, 64, 4096)
    fd = memory.fileno()
    assert fd is not None
    for nbytes in (0, 256, 256 + 4095, 256 + 4097):
        with pytest.raises(ProtocolError, match=f"sealed pool of {nbytes} bytes"):
            MappedPool(os.dup(fd), nbytes)
    pool = MappedPool(os.dup(fd), 256 + 4096)
    assert len(pool.bytes) == 256 + 4096
    pool.close()
    memory.close()


# ---- staging memory ----


def test_staging_is_given_in_aligned_parts_behind_the_blocks_and_taken_again() -> None:
    memory = KVMemory(3, 1, 100, 5 * 4096)
    staging = StagingArea(memory)
    first, second = staging.take(5000), staging.take(1)
    assert (first, second) == (Span(4096, 5000), Span(12288, 1))
    with pytest.raises(Unusable, match="no 4097 bytes of staging memory are left"):
        staging.take(4097)
    staging.give_back(first)
    staging.give_back(first)
    assert staging.take(8192) == Span(4096, 8192)
    memory.close()


def test_staging_of_a_worker_without_any_is_unusable() -> None:
    memory = KVMemory(3, 1, 4096)
    with pytest.raises(Unusable, match="it has 0"):
        StagingArea(memory).take(1)
    memory.close()


def test_staging_parts_never_overlap_and_all_of_it_can_be_used_over_random_histories() -> None:
    memory = KVMemory(1, 1, 4096, 64 * 4096)
    staging, rng = StagingArea(memory), random.Random(13)
    taken: list[Span] = []
    for _ in range(2000):
        if taken and rng.random() < 0.5:
            staging.give_back(taken.pop(rng.randrange(len(taken))))
            continue
        nbytes = rng.choice([1, 4096, 4097, 20000, 100_000])
        needed = -(-nbytes // 4096) * 4096
        ranges = sorted((span.offset, span.offset + -(-span.nbytes // 4096) * 4096) for span in taken)
        edges = [(0, 4096), *ranges, (memory.nbytes + memory.staging_bytes, 0)]
        gaps = [after[0] - before[1] for before, after in itertools.pairwise(edges)]
        if max(gaps) < needed:
            with pytest.raises(Unusable):
                staging.take(nbytes)
            continue
        span = staging.take(nbytes)
        assert span.offset % 4096 == 0
        assert memory.nbytes <= span.offset <= span.offset + nbytes <= memory.nbytes + memory.staging_bytes
        assert all(span.offset + nbytes <= start or span.offset >= stop for start, stop in ranges)
        taken.append(span)
    memory.close()


def test_rendezvous_token_works_once() -> None:
    rendezvous = Rendezvous(SeededIds(1))
    token = rendezvous.open()
    left, right = socket.socketpair()
    with left, right:
        assert not rendezvous.deliver(b"?" * 16, left)
        assert rendezvous.deliver(token, left)
        assert not rendezvous.deliver(token, right)
        assert rendezvous.collect(token, 1.0) is left
        assert not rendezvous.deliver(token, right)
    assert rendezvous.collect(rendezvous.open(), 0.0) is None
