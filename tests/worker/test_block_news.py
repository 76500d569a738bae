"""What a worker tells of its prefix cache: everything at first, changes in order, nothing without being asked."""

from __future__ import annotations

import random

import pytest

from penstock.core.block_names import block_names, name_key, unpack_names
from penstock.core.ids import BlockId
from penstock.engine.block_pool import BlockPool
from penstock.protocol.messages import BlockNews
from penstock.worker import block_news
from penstock.worker.block_news import BlockNewsDesk

KEY = name_key(b"k" * 32)


def hash_of(number: int) -> bytes:
    return number.to_bytes(32, "little")


def name_of(number: int) -> int:
    return block_names(KEY, [hash_of(number)])[0]


def store(pool: BlockPool, *numbers: int) -> None:
    for number in numbers:
        [block] = pool.allocate(1)
        pool.publish(block, hash_of(number))
        pool.free([block])


def only(desk: BlockNewsDesk) -> BlockNews:
    [(_, news)] = desk.take()
    return news


def test_nobody_who_has_not_asked_is_told_and_nothing_is_kept_for_them() -> None:
    pool = BlockPool(8, 4)
    desk = BlockNewsDesk(pool, KEY)
    store(pool, 1)
    assert desk.take() == []
    desk.watch("a", 1)
    desk.forget("a")
    assert pool.listener is None


def test_everything_comes_first_and_changes_follow() -> None:
    pool = BlockPool(2, 4)
    desk = BlockNewsDesk(pool, KEY)
    store(pool, 1)
    desk.watch("a", 7)
    first = only(desk)
    assert (first.watch, first.number, unpack_names(first.stored), first.removed) == (7, 1, [name_of(1)], b"")
    assert desk.take() == []
    store(pool, 2, 3)  # the third block drives the first out
    news = only(desk)
    assert (news.number, unpack_names(news.removed)) == (2, [name_of(1)])
    assert sorted(unpack_names(news.stored)) == sorted([name_of(2), name_of(3)])
    assert desk.told() == {"a": (7, 2)}


def test_what_is_undone_before_it_is_told_is_not_told() -> None:
    pool = BlockPool(4, 4)
    desk = BlockNewsDesk(pool, KEY)
    desk.watch("a", 1)
    assert only(desk).stored == b""
    store(pool, 1)
    pool.reset_prefix_cache()
    assert desk.take() == []


def test_late_router_gets_everything_and_the_other_one_only_what_changed() -> None:
    pool = BlockPool(8, 4)
    desk = BlockNewsDesk(pool, KEY)
    desk.watch("a", 1)
    desk.take()
    store(pool, 1)
    desk.take()
    desk.watch("b", 1)
    store(pool, 2)
    told = {router: (news.number, len(unpack_names(news.stored))) for router, news in desk.take()}
    assert told == {"a": (3, 1), "b": (1, 2)}


def test_request_that_was_overtaken_begins_nothing() -> None:
    pool = BlockPool(8, 4)
    desk = BlockNewsDesk(pool, KEY)
    desk.watch("a", 2)
    desk.take()
    desk.watch("a", 2)
    desk.watch("a", 1)
    assert desk.take() == []


def test_too_much_that_waits_leaves_a_gap_in_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_news, "MAX_PENDING", 3)
    pool = BlockPool(16, 4)
    desk = BlockNewsDesk(pool, KEY)
    desk.watch("a", 1)
    assert only(desk).number == 1
    store(pool, 1, 2, 3, 4, 5)
    assert only(desk).number == 3, "the router sees that number 2 is missing"


@pytest.mark.parametrize("seed", range(10))
def test_news_added_up_are_what_the_pool_can_find(seed: int) -> None:
    rng, pool = random.Random(seed), BlockPool(12, 4)
    desk = BlockNewsDesk(pool, KEY)
    desk.watch("a", 1)
    known: set[int] = set()
    for _ in range(300):
        if rng.random() < 0.7:
            number = rng.randrange(30)
            if not pool.match_prefix([hash_of(number)]):
                store(pool, number)
        elif rng.random() < 0.1:
            pool.reset_prefix_cache()
        else:
            held = pool.allocate(rng.randint(1, 4))
            pool.free([BlockId(block) for block in held])
        if rng.random() < 0.5:
            for _, news in desk.take():
                known |= set(unpack_names(news.stored))
                known -= set(unpack_names(news.removed))
            assert known == set(block_names(KEY, pool.published()))


def test_names_depend_on_the_clusters_key() -> None:
    assert block_names(name_key(b"one"), [hash_of(1)]) != block_names(name_key(b"two"), [hash_of(1)])
