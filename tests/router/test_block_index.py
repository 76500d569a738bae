"""The exact index: against a slow twin, at its bound, and in memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from penstock.core.ids import WorkerKey
from penstock.router.block_index import BlockIndex

WORKERS = [WorkerKey(f"w{number}", "0" * 16) for number in range(6)]


class SlowTwin:
    """Sets, and nothing clever."""

    def __init__(self) -> None:
        self.held: dict[WorkerKey, set[int]] = {worker: set() for worker in WORKERS}

    def match(self, names: list[int]) -> dict[WorkerKey, int]:
        depths = {}
        for worker, held in self.held.items():
            depth = 0
            while depth < len(names) and names[depth] in held:
                depth += 1
            if depth:
                depths[worker] = depth
        return depths


@pytest.mark.parametrize("seed", range(20))
def test_index_says_what_the_slow_twin_says(seed: int) -> None:
    rng = random.Random(seed)
    index, twin = BlockIndex(10_000), SlowTwin()
    chains = [[rng.randrange(1 << 64) for _ in range(12)] for _ in range(6)]
    for chain in chains[1:]:
        chain[: rng.randrange(8)] = chains[0][: rng.randrange(8)]
    for _ in range(300):
        worker, chain = rng.choice(WORKERS), rng.choice(chains)
        some = rng.sample(chain, rng.randint(1, len(chain)))
        action = rng.random()
        if action < 0.5:
            index.store(worker, some)
            twin.held[worker].update(some)
        elif action < 0.9:
            index.remove(worker, some)
            twin.held[worker].difference_update(some)
        else:
            index.forget(worker)
            twin.held[worker].clear()
        for names in chains:
            assert index.match(names) == twin.match(names)
        assert len(index) == len(set().union(*twin.held.values()))
    assert index.match([]) == {}


def test_index_keeps_its_bound_and_never_claims_what_is_not_held() -> None:
    index, rng = BlockIndex(100), random.Random(3)
    told: set[int] = set()
    for _ in range(1000):
        name = rng.randrange(1 << 64)
        told.add(name)
        index.store(WORKERS[0], [name])
        assert len(index) <= 100
        assert index.match([name]) == {WORKERS[0]: 1}, "the newest is known"
    assert set(index._holders) <= told
    index.store(WORKERS[1], range(1000))
    assert len(index) <= 100


def test_worker_that_comes_after_one_that_left_takes_its_bit_and_none_of_its_blocks() -> None:
    index = BlockIndex(100)
    index.store(WORKERS[0], [1, 2])
    index.store(WORKERS[1], [1])
    index.forget(WORKERS[0])
    index.store(WORKERS[2], [3])
    assert index.match([1]) == {WORKERS[1]: 1}
    assert index.match([2]) == {}
    assert index._bits[WORKERS[2]] == 1


def test_entry_takes_less_than_130_bytes() -> None:
    rng = random.Random(1)
    names = [rng.randrange(1 << 64) for _ in range(100_000)]
    tracemalloc.start()
    index = BlockIndex(len(names))
    for worker in WORKERS:
        index.store(worker, [int(name) for name in names])
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The names themselves are shared with the list here: 32 bytes each come on top.
    assert used / len(names) + 32 < 130
