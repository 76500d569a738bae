"""The pool against examples, and against a plain model of what it should do."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.core.errors import InternalError, Overloaded
from penstock.core.ids import BlockId
from penstock.core.prefix_hash import BlockHash
from penstock.engine.block_pool import BlockPool, OutOfBlocks


def name(i: int) -> BlockHash:
    return i.to_bytes(32, "little")


def cached_run(pool: BlockPool, num_blocks: int, first: int = 0) -> list[BlockId]:
    """A sequence of `num_blocks` full blocks that ran, was published and ended."""
    table = pool.allocate(num_blocks)
    for i, block_id in enumerate(table):
        assert pool.publish(block_id, name(first + i))
    pool.free(reversed(table))
    return table


def test_allocate_fresh_pool_gives_ascending_neighbours() -> None:
    pool = BlockPool(8, 16)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [3, 4]
    assert pool.num_free_blocks == 3


def test_allocate_after_free_reuses_blocks_in_order() -> None:
    pool = BlockPool(8, 16)
    first = pool.allocate(4)
    pool.free(reversed(first))
    assert pool.allocate(4) == first


def test_allocate_nothing_gives_nothing() -> None:
    pool = BlockPool(2, 16)
    assert pool.allocate(0) == []
    assert pool.num_free_blocks == 2


def test_allocate_too_many_raises_with_numbers_and_takes_none() -> None:
    pool = BlockPool(8, 16)
    pool.allocate(1)
    assert not pool.can_allocate(12)
    with pytest.raises(OutOfBlocks, match="needs 12 blocks, 7 free") as caught:
        pool.allocate(12)
    assert isinstance(caught.value, Overloaded)
    assert pool.num_free_blocks == 7
    pool.check_invariants([[BlockId(0)]])


def test_generation_grows_with_each_allocation_only() -> None:
    pool = BlockPool(1, 16)
    assert pool.generation(BlockId(0)) == 0
    (block_id,) = pool.allocate(1)
    pool.publish(block_id, name(1))
    pool.free([block_id])
    pool.acquire([block_id])
    assert pool.generation(block_id) == 1
    pool.free([block_id])
    pool.allocate(1)
    assert pool.generation(block_id) == 2


def test_free_twice_raises() -> None:
    pool = BlockPool(4, 16)
    (block_id,) = pool.allocate(1)
    pool.free([block_id])
    with pytest.raises(InternalError, match=r"block 0 \(generation 1\) is freed but nobody holds it"):
        pool.free([block_id])


def test_acquire_free_block_raises() -> None:
    with pytest.raises(InternalError, match="block 2 is free"):
        BlockPool(4, 16).acquire([BlockId(2)])


def test_match_prefix_stops_at_first_unknown_hash() -> None:
    pool = BlockPool(8, 16)
    table = cached_run(pool, 3)
    assert pool.match_prefix([name(0), name(1), name(9), name(2)]) == table[:2]
    assert pool.match_prefix([name(9), name(0)]) == []
    assert pool.match_prefix([]) == []


def test_match_prefix_finds_blocks_of_a_running_sequence() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(2)
    pool.publish(table[0], name(0))
    assert pool.match_prefix([name(0), name(1)]) == table[:1]
    pool.acquire(table[:1])
    assert pool.ref_count(table[0]) == 2
    pool.check_invariants([table, table[:1]])


def test_cached_blocks_count_as_free_until_acquired() -> None:
    pool = BlockPool(4, 16)
    table = cached_run(pool, 3)
    assert (pool.num_free_blocks, pool.num_cached_blocks) == (4, 3)
    pool.acquire(table)
    assert (pool.num_free_blocks, pool.num_cached_blocks) == (1, 0)


def test_allocate_under_pressure_evicts_deepest_block_first() -> None:
    pool = BlockPool(4, 16)
    table = cached_run(pool, 3)
    assert pool.allocate(2) == [table[2], 3]
    assert pool.match_prefix([name(0), name(1), name(2)]) == table[:2]


def test_allocate_under_pressure_evicts_least_recently_used_run() -> None:
    pool = BlockPool(4, 16)
    old, new = cached_run(pool, 2), cached_run(pool, 2, first=10)
    pool.acquire(old)
    pool.free(reversed(old))
    pool.allocate(2)
    assert pool.match_prefix([name(0), name(1)]) == old
    assert pool.match_prefix([name(10), name(11)]) == []
    assert pool.num_cached_blocks == len(new)


def test_publish_same_hash_twice_keeps_first_block() -> None:
    pool = BlockPool(4, 16)
    first, second = pool.allocate(2)
    assert pool.publish(first, name(0))
    assert pool.publish(first, name(0))
    assert not pool.publish(second, name(0))
    pool.free([second, first])
    assert pool.num_cached_blocks == 1
    assert pool.match_prefix([name(0)]) == [first]


def test_publish_second_hash_raises() -> None:
    pool = BlockPool(4, 16)
    (block_id,) = pool.allocate(1)
    pool.publish(block_id, name(0))
    with pytest.raises(InternalError, match="second hash"):
        pool.publish(block_id, name(1))


def test_publish_unreferenced_block_raises() -> None:
    with pytest.raises(InternalError, match="block 0 is published but nobody holds it"):
        BlockPool(4, 16).publish(BlockId(0), name(0))


def test_prefix_cache_off_retains_nothing() -> None:
    pool = BlockPool(4, 16, enable_prefix_cache=False)
    (block_id,) = pool.allocate(1)
    assert not pool.publish(block_id, name(0))
    pool.free([block_id])
    assert pool.match_prefix([name(0)]) == []
    assert (pool.num_free_blocks, pool.num_cached_blocks) == (4, 0)


def test_unpublish_keeps_references_and_frees_cached_blocks() -> None:
    pool = BlockPool(4, 16)
    cached = cached_run(pool, 1)
    (held,) = pool.allocate(1)
    pool.publish(held, name(5))
    pool.unpublish([*cached, held])
    assert pool.match_prefix([name(0)]) == pool.match_prefix([name(5)]) == []
    assert (pool.ref_count(held), pool.num_cached_blocks, pool.num_free_blocks) == (1, 0, 3)
    pool.check_invariants([[held]])


def test_reset_prefix_cache_forgets_all_and_counts_them() -> None:
    pool = BlockPool(8, 16)
    cached_run(pool, 3)
    (held,) = pool.allocate(1)
    pool.publish(held, name(9))
    assert pool.reset_prefix_cache() == 4
    assert pool.match_prefix([name(0)]) == pool.match_prefix([name(9)]) == []
    pool.check_invariants([[held]])
    assert pool.reset_prefix_cache() == 0


def test_check_invariants_wrong_owners_names_block_and_counts() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(2)
    with pytest.raises(AssertionError, match="block 1 has 1 references but 0 owners"):
        pool.check_invariants([table[:1]])
    with pytest.raises(AssertionError, match="block 0 has 1 references but 2 owners"):
        pool.check_invariants([table, table[:1]])
    with pytest.raises(AssertionError, match="block 77 has 0 references but 1 owners"):
        pool.check_invariants([table, [BlockId(77)]])


def test_check_invariants_block_in_two_places_is_named() -> None:
    pool = BlockPool(4, 16)
    (block_id,) = pool.allocate(1)
    pool._free.append(block_id)
    with pytest.raises(AssertionError, match="block 0 is in 2 places, with 1 references"):
        pool.check_invariants()


def test_check_invariants_stranded_block_is_named() -> None:
    pool = BlockPool(4, 16)
    pool._ref_counts[pool.allocate(1)[0]] = 0
    with pytest.raises(AssertionError, match="block 0 is in 0 places, with 0 references"):
        pool.check_invariants()


@pytest.mark.parametrize("attribute", ["_block_of", "_hash_of"])
def test_check_invariants_broken_hash_map_is_found(attribute: str) -> None:
    pool = BlockPool(4, 16)
    cached_run(pool, 2)
    getattr(pool, attribute).popitem()
    with pytest.raises(AssertionError, match="differ for blocks"):
        pool.check_invariants()


def test_adopted_blocks_are_free_and_handed_out_ascending() -> None:
    pool = BlockPool.of(map(BlockId, (21, 3, 20, 22)), 16)
    assert (pool.num_blocks, pool.num_free_blocks, pool.block_ids()) == (4, 4, [3, 20, 21, 22])
    assert pool.allocate(2) == [3, 20]
    pool.adopt(map(BlockId, (9, 8, 7)))
    assert pool.allocate(3) == [7, 8, 9], "what came last goes first, side by side"
    assert BlockId(7) in pool
    assert BlockId(0) not in pool
    pool.check_invariants([[BlockId(3), BlockId(20)], [BlockId(7), BlockId(8), BlockId(9)]])


def test_adopt_held_brings_a_block_in_use_with_its_next_generation() -> None:
    pool = BlockPool(2, 16)
    pool.adopt_held([BlockId(9)])
    assert (pool.ref_count(BlockId(9)), pool.generation(BlockId(9)), pool.num_free_blocks) == (1, 1, 2)
    assert pool.publish(BlockId(9), name(0))
    pool.free([BlockId(9)])
    assert pool.match_prefix([name(0)]) == [9]


@pytest.mark.parametrize("ids", [[0, 5], [5, 5]])
def test_block_that_is_here_already_cannot_enter(ids: list[int]) -> None:
    pool = BlockPool(2, 16)
    for enter in (pool.adopt, pool.adopt_held):
        with pytest.raises(InternalError, match="has them already"):
            enter(map(BlockId, ids))
    assert pool.block_ids() == [0, 1]


def test_surrendered_block_leaves_with_its_hash_and_comes_back_as_another() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(2)
    pool.publish(table[0], name(0))
    pool.surrender(table)
    assert (pool.num_blocks, pool.num_free_blocks) == (2, 2)
    assert pool.match_prefix([name(0)]) == []
    assert not pool.is_published(table[0])
    assert not pool.can_allocate(3)
    pool.adopt(table)
    assert pool.allocate(4) == [0, 1, 2, 3]
    assert pool.generation(table[0]) == 2


def test_only_a_block_with_one_reference_leaves_and_none_goes_when_one_cannot() -> None:
    pool = BlockPool(4, 16)
    shared, alone = pool.allocate(2)
    pool.publish(shared, name(0))
    pool.acquire([shared])
    for block_ids, why in (
        ([alone, shared], "block 0 has 2 references"),
        ([alone, BlockId(3)], "block 3 has 0 references"),
        ([alone, BlockId(77)], "block 77 is not in this pool"),
        ([alone, alone], "one of them twice"),
    ):
        with pytest.raises(InternalError, match=why):
            pool.surrender(block_ids)
    pool.check_invariants([[shared, alone], [shared]])


def test_calls_about_a_block_of_another_pool_raise() -> None:
    pool = BlockPool(2, 16)
    for call in (lambda b: pool.free([b]), lambda b: pool.acquire([b]), lambda b: pool.publish(b, name(0))):
        with pytest.raises(InternalError, match="block 9"):
            call(BlockId(9))


NUM_BLOCKS = 7
HASHES = st.integers(0, 9)


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls. The model: who holds what, which block has which hash, and the cached blocks by age."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 16)
        self.tables: list[list[BlockId]] = []
        self.hashes: dict[BlockId, int] = {}
        self.cached: list[BlockId] = []
        self.generations = dict.fromkeys(range(NUM_BLOCKS), 0)
        self.outside: list[BlockId] = []

    def count(self, block_id: BlockId) -> int:
        return sum(table.count(block_id) for table in self.tables)

    def num_free(self) -> int:
        return sum(self.count(BlockId(i)) == 0 for i in range(NUM_BLOCKS) if BlockId(i) not in self.outside)

    @rule(num_blocks=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, num_blocks: int) -> None:
        free = self.num_free()
        assert self.pool.can_allocate(num_blocks) == (num_blocks <= free)
        if num_blocks > free:
            with pytest.raises(OutOfBlocks, match=f"needs {num_blocks} blocks, {free} free"):
                self.pool.allocate(num_blocks)
            return
        table = self.pool.allocate(num_blocks)
        assert table == sorted(set(table))
        assert len(table) == num_blocks
        assert not any(map(self.count, table))
        num_evicted = max(0, num_blocks - (free - len(self.cached)))
        evicted, self.cached = self.cached[:num_evicted], self.cached[num_evicted:]
        assert set(evicted) <= set(table)
        assert not set(self.cached) & set(table)
        for block_id in evicted:
            del self.hashes[block_id]
        for block_id in table:
            self.generations[block_id] += 1
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free_table(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        for block_id in reversed(table):
            if self.count(block_id) == 0 and block_id in self.hashes:
                self.cached.append(block_id)
        self.pool.free(reversed(table))

    @rule(data=st.data())
    def free_block_nobody_holds(self, data: st.DataObject) -> None:
        block_id = BlockId(data.draw(st.integers(0, NUM_BLOCKS - 1)))
        if self.count(block_id) == 0:
            with pytest.raises(InternalError):
                self.pool.free([block_id])

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), hash_id=HASHES)
    def publish(self, data: st.DataObject, hash_id: int) -> None:
        block_id = data.draw(st.sampled_from(sorted({b for table in self.tables for b in table})))
        if self.hashes.get(block_id, hash_id) != hash_id:
            with pytest.raises(InternalError):
                self.pool.publish(block_id, name(hash_id))
            return
        is_taken = any(h == hash_id and b != block_id for b, h in self.hashes.items())
        assert self.pool.publish(block_id, name(hash_id)) == (not is_taken)
        if not is_taken:
            self.hashes[block_id] = hash_id

    @rule(hash_ids=st.lists(HASHES, max_size=4, unique=True))
    def share_prefix(self, hash_ids: list[int]) -> None:
        by_hash = {h: b for b, h in self.hashes.items()}
        expected = []
        for hash_id in hash_ids:
            if hash_id not in by_hash:
                break
            expected.append(by_hash[hash_id])
        assert self.pool.match_prefix([name(h) for h in hash_ids]) == expected
        self.pool.acquire(expected)
        self.cached = [b for b in self.cached if b not in expected]
        self.tables.append(expected)

    @rule(block_ids=st.lists(st.integers(0, NUM_BLOCKS - 1).map(BlockId), max_size=3))
    def unpublish(self, block_ids: list[BlockId]) -> None:
        self.pool.unpublish(block_ids)
        for block_id in block_ids:
            self.hashes.pop(block_id, None)
        self.cached = [b for b in self.cached if b not in block_ids]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def surrender_table(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        if any(self.count(block_id) != 1 for block_id in table):
            with pytest.raises(InternalError):
                self.pool.surrender(table)
            return
        self.pool.surrender(table)
        self.tables.remove(table)
        self.outside += table
        for block_id in table:
            self.hashes.pop(block_id, None)

    @rule(data=st.data(), is_held=st.booleans())
    def adopt(self, data: st.DataObject, is_held: bool) -> None:
        table = data.draw(st.lists(st.sampled_from(self.outside), unique=True)) if self.outside else []
        self.outside = [block_id for block_id in self.outside if block_id not in table]
        if not is_held:
            self.pool.adopt(table)
            return
        self.pool.adopt_held(table)
        self.tables.append(table)
        for block_id in table:
            self.generations[block_id] += 1

    @rule()
    def reset(self) -> None:
        assert self.pool.reset_prefix_cache() == len(self.hashes)
        self.hashes, self.cached = {}, []

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_invariants(self.tables)
        assert self.pool.block_ids() == [i for i in range(NUM_BLOCKS) if BlockId(i) not in self.outside]
        assert self.pool.num_free_blocks == self.num_free()
        assert self.pool.num_cached_blocks == len(self.cached)
        assert {i: self.pool.generation(BlockId(i)) for i in range(NUM_BLOCKS)} == self.generations
        for block_id, hash_id in self.hashes.items():
            assert self.pool.match_prefix([name(hash_id)]) == [block_id]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=120,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
