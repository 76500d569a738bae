"""A router that follows workers' caches places by what they hold, also what it has not placed itself."""

from __future__ import annotations

import pytest

from penstock.core.block_names import block_name, name_key
from penstock.core.ids import WorkerKey
from penstock.core.prefix_hash import block_hashes
from penstock.protocol.messages import BlockNews, Heartbeat, StartDecode, WatchBlocks, WorkerLoad

from .conftest import FINGERPRINT, Rig

SECRET = name_key(Rig.cluster_key)


def names_of(num_tokens: int, salt: str = "") -> bytes:
    """Names of the full blocks of `rig.submit`'s prompt."""
    hashes = block_hashes(FINGERPRINT.cache_key(salt), list(range(num_tokens)), FINGERPRINT.block_size)
    return b"".join(block_name(SECRET, block_hash) for block_hash in hashes)


@pytest.fixture
def pair(make_rig):
    rig = make_rig(policy="kv-overlap", max_exact_blocks=1000)
    workers = [rig.key("a"), rig.key("b")]
    for worker in workers:
        rig.hello(worker)
        rig.beat(worker)
    return rig, *workers


def watch_of(rig, worker: WorkerKey) -> int:
    return max(s.message.body.watch for s in rig.sent[worker] if isinstance(s.message.body, WatchBlocks))


def num_watches(rig, worker: WorkerKey) -> int:
    return sum(isinstance(s.message.body, WatchBlocks) for s in rig.sent[worker])


def place(rig, request_id: str, prompt: int = 40) -> WorkerKey:
    rig.submit(request_id, prompt=prompt)
    [worker] = [
        worker
        for worker, sends in rig.sent.items()
        if any(isinstance(s.message.body, StartDecode) and s.message.body.request_id == request_id for s in sends)
    ]
    return worker


@pytest.mark.parametrize("holder", [0, 1])
def test_prompt_goes_where_its_blocks_are_though_this_router_never_sent_it_there(pair, holder):
    rig, *workers = pair
    for number, worker in enumerate(workers):
        stored = names_of(40) if number == holder else b""
        rig.say(worker, BlockNews(watch_of(rig, worker), 1, stored))
    assert place(rig, "r") == workers[holder]


def test_blocks_that_are_gone_draw_nothing(pair):
    rig, a, b = pair
    rig.say(a, BlockNews(watch_of(rig, a), 1, names_of(40)))
    rig.say(b, BlockNews(watch_of(rig, b), 1, names_of(20)))
    rig.say(a, BlockNews(watch_of(rig, a), 2, b"", names_of(40)))
    assert place(rig, "r") == b


def test_blocks_of_another_tenant_draw_nothing(pair):
    rig, a, b = pair
    rig.say(a, BlockNews(watch_of(rig, a), 1, b""))
    rig.say(b, BlockNews(watch_of(rig, b), 1, names_of(40, salt="somebody")))
    assert place(rig, "r") == a, "the first of two that hold nothing"


def test_prompt_on_its_way_draws_the_next_before_any_news(make_rig):
    rig = make_rig(policy="prefix-affinity", max_exact_blocks=1000)
    for worker in (rig.key("a"), rig.key("b")):
        rig.hello(worker)
        rig.beat(worker)
        rig.say(worker, BlockNews(watch_of(rig, worker), 1))
    first = place(rig, "one")
    assert place(rig, "two") == first


def test_missing_news_begin_the_next_watch_and_nothing_is_believed_meanwhile(pair):
    rig, a, _ = pair
    rig.say(a, BlockNews(watch_of(rig, a), 1, names_of(40)))
    before = watch_of(rig, a)
    rig.say(a, BlockNews(before, 3, b""))
    assert watch_of(rig, a) > before
    assert not rig.core._life.placer.blocks.follows(a)
    rig.say(a, BlockNews(before, 4, names_of(40)))
    assert len(rig.core._life.placer.blocks.index) == 0, "news of the old watch"
    rig.say(a, BlockNews(watch_of(rig, a), 1, names_of(40)))
    assert rig.core._life.placer.blocks.follows(a)


def test_doubled_and_late_news_change_nothing(pair):
    rig, a, _ = pair
    watch, index = watch_of(rig, a), rig.core._life.placer.blocks.index
    for number, removed in ((1, b""), (2, names_of(40)), (1, b"")):
        rig.say(a, BlockNews(watch, number, b"" if removed else names_of(40), removed))
    assert len(index) == 0
    assert num_watches(rig, a) == 1


@pytest.mark.parametrize("told", [None, (1, 5)])
def test_heartbeats_that_differ_for_long_begin_the_next_watch(pair, told):
    rig, a, _ = pair
    rig.say(a, BlockNews(watch_of(rig, a), 1))
    for _ in range(4):
        rig.say(a, Heartbeat(0, "ready", WorkerLoad(), [], [], news=told))
        assert num_watches(rig, a) == 1
        rig.clock.advance(0.6)
    rig.say(a, Heartbeat(0, "ready", WorkerLoad(), [], [], news=told))
    assert num_watches(rig, a) == 2


def test_worker_that_is_gone_holds_nothing(pair):
    rig, a, _ = pair
    rig.say(a, BlockNews(watch_of(rig, a), 1, names_of(40)))
    rig.do(rig.core.process_ended(a, "killed"))
    assert len(rig.core._life.placer.blocks.index) == 0


def test_nobody_is_asked_where_the_index_is_off(rig):
    worker = rig.key("a")
    rig.hello(worker)
    rig.beat(worker)
    assert num_watches(rig, worker) == 0
