"""The replay against the slow, obvious simulation of the same cluster: one tick after the other."""

from __future__ import annotations

import random

import pytest

from penstock.gateway.explain.replay import Job, Size, replay


def brute_force(jobs: list[Job], size: Size) -> list[float]:
    """Whole-numbered times; every tick looks at every queue."""
    ttfts: dict[int, float] = {}
    router, queue = list(range(len(jobs))), list[int]()
    local: list[list[int]] = [[] for _ in range(size.decode)]
    free = [size.blocks] * size.decode
    busy: list[tuple[int, float] | None] = [None] * size.prefill
    local_busy: list[tuple[int, float] | None] = [None] * size.decode
    ends: list[tuple[float, int, int]] = []
    now = 0.0
    while len(ttfts) < len(jobs):
        for end in [end for end in ends if end[0] <= now]:
            ends.remove(end)
            free[end[1]] += end[2]
        for servers in (busy, local_busy):
            for place, item in enumerate(servers):
                if item is not None and item[1] <= now:
                    servers[place] = None
        while router and jobs[router[0]].arrival_s <= now:
            needed = min(jobs[router[0]].blocks, size.blocks)
            worker = max(range(size.decode), key=free.__getitem__)
            if free[worker] < needed:
                break
            number = router.pop(0)
            free[worker] -= needed
            where[number] = worker
            (local[worker] if jobs[number].is_local else queue).append(number)
        for servers, queues in ((busy, [queue] * size.prefill), (local_busy, local)):
            for place, waiting in enumerate(queues):
                if servers[place] is None and waiting:
                    number = waiting.pop(0)
                    job = jobs[number]
                    done = now + job.prefill_s
                    servers[place] = (number, done)
                    ttfts[number] = done + job.fixed_s - job.arrival_s
                    ends.append((done + job.fixed_s + job.residence_s, where[number], min(job.blocks, size.blocks)))
        now += 1.0
    return [ttfts[number] for number in range(len(jobs))]


where: dict[int, int] = {}


def some_jobs(seed: int, local_share: float) -> list[Job]:
    rng = random.Random(seed)
    arrival, jobs = 0.0, []
    for _ in range(60):
        arrival += rng.randrange(1, 12)
        is_local = rng.random() < local_share
        jobs.append(
            Job(
                arrival,
                rng.randrange(1, 15),
                rng.randrange(1, 4),
                rng.randrange(1, 120),
                rng.randrange(1, 40),
                is_local,
            )
        )
    return jobs


@pytest.mark.parametrize("seed", range(40))
def test_replay_equals_the_tick_by_tick_simulation(seed: int) -> None:
    size = Size(prefill=1 + seed % 3, decode=1 + seed % 4, blocks=60)
    jobs = some_jobs(seed, (0.0, 0.5, 1.0)[seed % 3])
    assert replay(jobs, size) == brute_force(jobs, size)


def test_another_prefill_worker_never_makes_it_worse_and_helps_where_prompts_queue() -> None:
    jobs = [Job(float(i), 2.0, 0.0, 0.0, 1) for i in range(50)]
    one, two, three = (replay(jobs, Size(n, 1, 1000)) for n in (1, 2, 3))
    assert one[-1] == pytest.approx(2.0 + 49.0)
    assert two == [2.0] * 50 == three


def test_request_larger_than_a_worker_takes_a_whole_one() -> None:
    jobs = [Job(0.0, 1.0, 0.0, 10.0, 500), Job(1.0, 1.0, 0.0, 0.0, 500)]
    assert replay(jobs, Size(1, 1, 100)) == [1.0, 11.0]
