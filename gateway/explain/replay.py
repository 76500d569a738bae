"""The recorded window once more, on a cluster of another size: a queueing model that is replayed, not solved.

Each request brings what was measured of it: its arrival, the work of its prefill, what its first token took beside
queues and prefill, how long it then held its blocks. A cluster is some prefill workers, one prompt at a time each,
and some decode workers with so many blocks each. As in the router, a request leaves the queue when a decode worker has
room for it, first come first served, and holds that room to its end; prompts wait for the worker that is free first. A
request that was prefilled where it decodes is again.

Left out: prefix caches that would fill otherwise, steps that grow with the batch, cores that workers share, failures.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """Seconds; `fixed_s` is what of the TTFT neither queues nor prefill took."""

    arrival_s: float
    prefill_s: float
    fixed_s: float
    residence_s: float
    blocks: int
    is_local: bool = False


@dataclass(frozen=True, slots=True)
class Size:
    """`blocks`: of each decode worker; a request larger than that takes a whole one."""

    prefill: int
    decode: int
    blocks: int


def replay(jobs: Sequence[Job], size: Size) -> list[float]:
    """The TTFT of each job, which come in order of arrival. `size` has a decode worker, and a prefill worker unless
    every job is local.
    """
    rooms = _Rooms(size)
    prefill_free = [0.0] * size.prefill
    local_free = [0.0] * size.decode
    ttfts: list[float] = []
    dispatched_s = float("-inf")
    for job in jobs:
        dispatched_s, worker = rooms.enter(job, max(job.arrival_s, dispatched_s))
        free, place = (local_free, worker) if job.is_local else (prefill_free, _first_free(prefill_free))
        free[place] = max(dispatched_s, free[place]) + job.prefill_s
        ttfts.append(free[place] + job.fixed_s - job.arrival_s)
        rooms.leave_at(free[place] + job.fixed_s + job.residence_s, worker, job)
    return ttfts


def _first_free(free: list[float]) -> int:
    return min(range(len(free)), key=free.__getitem__)


class _Rooms:
    """The decode workers' blocks, and when they come back."""

    def __init__(self, size: Size) -> None:
        self._size = size
        self._free = [size.blocks] * size.decode
        self._ends: list[tuple[float, int, int]] = []

    def enter(self, job: Job, now: float) -> tuple[float, int]:
        """Take the job's blocks on the worker with most of them: (when there was room, which worker)."""
        needed = self._needed(job)
        while True:
            while self._ends and self._ends[0][0] <= now:
                _, worker, blocks = heapq.heappop(self._ends)
                self._free[worker] += blocks
            worker = max(range(self._size.decode), key=self._free.__getitem__)
            if self._free[worker] >= needed:
                self._free[worker] -= needed
                return now, worker
            now = self._ends[0][0]

    def leave_at(self, when: float, worker: int, job: Job) -> None:
        heapq.heappush(self._ends, (when, worker, self._needed(job)))

    def _needed(self, job: Job) -> int:
        return min(job.blocks, self._size.blocks)
