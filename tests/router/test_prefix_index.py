from __future__ import annotations

import pytest

from penstock.core.ids import WorkerKey
from penstock.core.prefix_hash import block_hashes, hash_key
from penstock.router.prefix_index import MAX_HOLDERS, MAX_WORKERS_PER_BLOCK, PrefixIndex

A, B = WorkerKey("a", "0" * 16), WorkerKey("b", "1" * 16)


def hashes(*token_ids, salt=""):
    return block_hashes(hash_key(salt, "m", "router"), token_ids, 1)


def test_match_counts_leading_blocks_for_each_worker():
    index = PrefixIndex(100)
    index.insert(hashes(1, 2, 3), A)
    index.insert(hashes(1, 2, 9), B)
    assert index.match(hashes(1, 2, 3, 4)) == {A: 3, B: 2}
    assert index.match(hashes(1, 7)) == {A: 1, B: 1}
    assert index.match(hashes(5)) == {}
    assert index.match([]) == {}


@pytest.mark.parametrize("length", range(1, 20))
def test_match_ends_where_the_worker_s_blocks_end(length):
    index = PrefixIndex(100)
    chain = hashes(*range(20))
    index.insert(chain, B)
    index.insert(chain[:length], A)
    assert index.match(chain) == {B: 20, A: length}
    assert index.match(chain[:7]) == {B: 7, A: min(7, length)}


def test_blocks_on_their_way_are_expected_and_not_here():
    index = PrefixIndex(100)
    chain = hashes(1, 2, 3, 4)
    index.insert(chain[:2], A)
    index.insert(chain, A, is_here=False)
    assert index.matches(chain) == ({A: 4}, {A: 2})
    index.insert(chain[:3], A)
    assert index.matches(chain) == ({A: 4}, {A: 3})


def test_worker_is_ascribed_no_more_than_its_cache_has_room_for():
    index = PrefixIndex(100)
    index.insert(hashes(1, 2, 3), A, sizes=[16, 16, 32], capacity=64)
    index.insert(hashes(1, 2, 3), B)
    index.insert(hashes(7), A, sizes=[16], capacity=64)
    assert index.match(hashes(1, 2, 3)) == {A: 2, B: 3}
    index.insert(hashes(8), A, sizes=[16], capacity=0)
    assert index.match(hashes(8)) == {}
    assert index.match(hashes(1)) == {B: 1}
    index.forget(B)
    assert len(index) == 0


def test_holders_are_bounded_in_all():
    index = PrefixIndex(10)
    for i in range(50):
        index.insert(hashes(*range(10)), WorkerKey(f"w{i}", "0" * 16))
    assert sum(index.match(hashes(*range(10))).values()) <= MAX_HOLDERS * 10


def test_index_never_holds_more_than_its_cap_and_keeps_heads_longest():
    index = PrefixIndex(4)
    index.insert(hashes(*range(10)), A)
    assert len(index) == 4
    assert index.match(hashes(*range(10))) == {A: 4}
    index.insert(hashes(77), B)
    assert len(index) == 4
    assert index.match(hashes(*range(10))) == {A: 3}


def test_index_evicts_the_least_recently_used_prompt():
    index = PrefixIndex(4)
    index.insert(hashes(1, 2), A)
    index.insert(hashes(3, 4), A)
    index.insert(hashes(1, 2), A)
    index.insert(hashes(5, 6), A)
    assert index.match(hashes(1, 2)) == {A: 2}
    assert index.match(hashes(3, 4)) == {}


def test_index_bounds_the_workers_of_one_block():
    index = PrefixIndex(1000)
    for i in range(MAX_WORKERS_PER_BLOCK + 50):
        index.insert(hashes(1), WorkerKey(f"w{i}", "0" * 16))
    matched = index.match(hashes(1))
    assert len(matched) == MAX_WORKERS_PER_BLOCK
    assert WorkerKey("w49", "0" * 16) not in matched
    assert WorkerKey(f"w{MAX_WORKERS_PER_BLOCK + 49}", "0" * 16) in matched


def test_forget_drops_one_worker_and_empty_blocks():
    index = PrefixIndex(10)
    index.insert(hashes(1, 2), A)
    index.insert(hashes(1), B)
    index.forget(A)
    assert index.match(hashes(1, 2)) == {B: 1}
    assert len(index) == 1
    index.clear()
    assert len(index) == 0


@pytest.mark.parametrize("salt", ["", "tenant"])
def test_prompts_of_other_tenants_never_match(salt):
    index = PrefixIndex(10)
    index.insert(hashes(1, 2, salt=salt), A)
    assert index.match(hashes(1, 2, salt="other")) == {}
