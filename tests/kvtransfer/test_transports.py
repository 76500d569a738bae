"""The small parts under the links: digests, runs of blocks, addresses, mapped pools, rendezvous."""

from __future__ import annotations

import os
import random
import socket

import pytest

from penstock.core.errors import ProtocolError
from penstock.core.ids import SeededIds
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.acceptance import Acceptances
from penstock.kvtransfer.digest import DIGEST_BYTES, block_digest
from penstock.kvtransfer.linking import dials
from penstock.kvtransfer.transports.address import KvAddress
from penstock.kvtransfer.transports.runs import runs
from penstock.kvtransfer.transports.shm import MappedPool, pull
from penstock.kvtransfer.transports.tcp import Rendezvous
from penstock.protocol.messages import Peer, Push, Role


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


def test_runs_join_only_what_is_adjacent_in_every_table() -> None:
    assert list(runs([3, 4, 5, 9, 10], max_length=9)) == [(0, 3), (3, 2)]
    assert list(runs([3, 4, 5, 6], [7, 8, 1, 2], max_length=9)) == [(0, 2), (2, 2)]
    assert list(runs([0, 1, 2, 3, 4], max_length=2)) == [(0, 2), (2, 2), (4, 1)]
    assert list(runs([5, 4, 3], max_length=9)) == [(0, 1), (1, 1), (2, 1)]
    assert list(runs([], max_length=9)) == []


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


def test_pull_copies_layers_of_each_block() -> None:
    source, target = KVMemory(8, 4, 16), KVMemory(8, 4, 16)
    source.buffer[:] = random.Random(2).randbytes(source.nbytes)
    acceptances = Acceptances(num_layers=4)
    fd = source.fileno()
    assert fd is not None
    pool = MappedPool(os.dup(fd), 8, source.block_bytes)
    for first_layer, num_layers in ((0, 1), (1, 3)):
        push = Push(
            ticket=b"t" * 16,
            generation=1,
            first_layer=first_layer,
            num_layers=num_layers,
            ordinals=[0, 1],
            digests=[b"d" * 8] * 2,
            source_slots=[3, 4],
        )
        acceptances.accept(push.ticket, 1, {0: 6, 1: 7})  # type: ignore[arg-type, dict-item]
        blocks = acceptances.claim(push)
        assert blocks is not None
        pull(pool, target, push, blocks, acceptances)
        assert target.block(6, first_layer, num_layers) == source.block(3, first_layer, num_layers)
    assert target.block(7) == source.block(4)
    assert not any(target.buffer[: 6 * target.block_bytes])
    pool.close()
    source.close()
    target.close()


def test_descriptor_that_is_no_sealed_pool_is_refused() -> None:
    """A reader of a file that shrinks dies with SIGBUS; so it is not mapped at all."""
    for nbytes in (4096, 8192):
        fd = os.memfd_create("not-sealed")
        os.ftruncate(fd, nbytes)
        with pytest.raises(ProtocolError, match="sealed pool"):
            MappedPool(fd, 4, 1024)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


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
