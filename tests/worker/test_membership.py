"""A worker's place in the memory that all workers share: from the topology to its blocks, over two lives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from penstock.core.config import DecodeConfig, PrefillConfig, Topology
from penstock.core.errors import ConfigError, InternalError, ProtocolError
from penstock.core.ids import BlockId
from penstock.engine.shared_files import SharedFiles
from penstock.worker.membership import Membership, shares_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")
TOPOLOGY = replace(
    Topology(), prefill=PrefillConfig(num_blocks=6), decode=DecodeConfig(replicas=2, kv_cache_bytes=1 << 16)
)
LAYERS, LAYER_BYTES = 2, 4096  # 8 blocks in 64 KiB


@pytest.fixture
def shared() -> Iterator[SharedFiles]:
    files = SharedFiles()
    yield files
    files.close()


def member(shared: SharedFiles, name: str) -> Membership:
    return Membership(TOPOLOGY, TOPOLOGY.worker(name), shared.environment())


def test_every_worker_finds_the_same_shares() -> None:
    assert shares_of(TOPOLOGY.workers(), LAYERS * LAYER_BYTES) == [6, 8, 8]
    with pytest.raises(ConfigError, match="fewer than two blocks"):
        shares_of(TOPOLOGY.workers(), 1 << 16)


def test_workers_begin_with_their_shares_of_one_memory(shared: SharedFiles) -> None:
    first, last = member(shared, "prefill-0"), member(shared, "decode-1")
    mine, theirs = first.make_memory(6, LAYERS, LAYER_BYTES), last.make_memory(8, LAYERS, LAYER_BYTES)
    assert (mine.num_blocks, mine.staging_bytes, first.number, last.number) == (22, 0, 1, 3)
    assert [first.number_of(name) for name in ("prefill-0", "decode-0", "decode-1")] == [1, 2, 3]
    with pytest.raises(ProtocolError, match="worker stranger has no place"):
        first.number_of("stranger")
    assert first.first_pool(16).block_ids() == list(range(6))
    assert last.first_pool(16).block_ids() == list(range(14, 22))
    mine.block(20)[:4] = b"seen"
    assert bytes(theirs.block(20)[:4]) == b"seen"
    for memory, membership in ((mine, first), (theirs, last)):
        memory.close()
        membership.close()
        membership.close()


def test_next_life_begins_with_what_the_ledger_says(shared: SharedFiles) -> None:
    for expected in ([*range(6)], [0, 1, 2, 5]):
        membership = member(shared, "prefill-0")
        membership.make_memory(6, LAYERS, LAYER_BYTES).close()
        assert membership.first_pool(16).block_ids() == expected
        if len(expected) == 6:
            membership.pool.ledger.give([BlockId(3), BlockId(4)], 1, 2)
        membership.close()


def test_worker_without_a_supervisor_is_told_how_to_start() -> None:
    with pytest.raises(ConfigError, match="start the workers through `penstock serve`, or set one_pool to false"):
        Membership(TOPOLOGY, TOPOLOGY.worker("prefill-0"), {})


def test_memory_of_another_size_than_the_share_is_our_own_fault(shared: SharedFiles) -> None:
    membership = member(shared, "prefill-0")
    with pytest.raises(InternalError, match="worker 1 has 7 blocks"):
        membership.make_memory(7, LAYERS, LAYER_BYTES)
    with pytest.raises(InternalError, match="joined when the engine makes its memory"):
        membership.first_pool(16)
    membership.close()
