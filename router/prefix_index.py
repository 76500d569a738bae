"""Which workers probably hold the KV of which prompt prefix: a guess from what was sent to them, never a promise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple

from ..core.ids import WorkerKey

MAX_WORKERS_PER_BLOCK = 512  # who drops out of the head of a common prefix is not found for its tail either
MAX_HOLDERS = 4  # in all, for each block that the index may know


class Matches(NamedTuple):
    """Leading blocks by worker: those it holds or will hold when what is on its way has come, and those it has now."""

    expected: dict[WorkerKey, int]
    here: dict[WorkerKey, int]


class _Holding:
    """The blocks ascribed to one worker, least recently used first, with their tokens."""

    def __init__(self) -> None:
        self.tokens: OrderedDict[Hashable, int] = OrderedDict()
        self.total = 0

    def touch(self, block_hash: Hashable, num_tokens: int) -> None:
        if block_hash not in self.tokens:
            self.tokens[block_hash] = num_tokens
            self.total += num_tokens
        self.tokens.move_to_end(block_hash)

    def drop(self, block_hash: Hashable) -> None:
        self.total -= self.tokens.pop(block_hash, 0)


class PrefixIndex:
    """Block hash → workers, at most `max_blocks` hashes and MAX_HOLDERS times as many holders in all, and for each
    worker what its cache has room for; least recently used out first.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._holders: OrderedDict[Hashable, dict[WorkerKey, bool]] = OrderedDict()  # whether it is there already
        self._holdings: dict[WorkerKey, _Holding] = {}
        self._num_held = 0

    def __len__(self) -> int:
        return len(self._holders)

    def insert(
        self,
        hashes: Sequence[Hashable],
        worker: WorkerKey,
        *,
        is_here: bool = True,
        sizes: Sequence[int] | None = None,
        capacity: int | None = None,
    ) -> None:
        """Note that `worker` will hold these leading blocks of a prompt, or of a prompt and its answer; with `is_here`,
        before it can compute anything that is sent to it now. `sizes` are the blocks' tokens (1 each when not given),
        `capacity` what its cache has room for.
        """
        hashes = hashes[: self._max_blocks]
        holding = self._holdings.setdefault(worker, _Holding())
        # Last block first, so that the head of a prompt is the youngest entry: a tail without its head matches nothing.
        for place in range(len(hashes) - 1, -1, -1):
            block_hash = hashes[place]
            holders = self._holders.setdefault(block_hash, {})
            self._num_held += worker not in holders
            holders[worker] = holders.pop(worker, False) or is_here
            holding.touch(block_hash, sizes[place] if sizes is not None else 1)
            self._holders.move_to_end(block_hash)
            if len(holders) > MAX_WORKERS_PER_BLOCK:
                self._drop(block_hash, next(iter(holders)))
        while capacity is not None and holding.total > capacity and holding.tokens:
            self._drop(next(iter(holding.tokens)), worker)
        while len(self._holders) > self._max_blocks or self._num_held > MAX_HOLDERS * self._max_blocks:
            oldest = next(iter(self._holders))
            for holder in list(self._holders[oldest]):
                self._drop(oldest, holder)

    def _drop(self, block_hash: Hashable, worker: WorkerKey) -> None:
        holders = self._holders[block_hash]
        del holders[worker]
        self._num_held -= 1
        self._holdings[worker].drop(block_hash)
        if not holders:
            del self._holders[block_hash]

    def match(self, hashes: Sequence[Hashable]) -> dict[WorkerKey, int]:
        """For each worker that holds any, how many leading blocks it holds without a hole."""
        return self.matches(hashes).expected

    def matches(self, hashes: Sequence[Hashable]) -> Matches:
        """For each worker that holds any, how many leading blocks it holds without a hole.

        Whoever holds a block holds those before it: they are noted together, and the head goes last. So the end of a
        match is found by halving, whatever its length.
        """
        expected: dict[WorkerKey, int] = {}
        here: dict[WorkerKey, int] = {}
        for worker, is_here in self._holders.get(hashes[0], {}).items() if hashes else ():
            held = self._holdings[worker].tokens
            depth = _leading(hashes, len(hashes), held.__contains__)
            expected[worker] = depth
            if is_here:
                here[worker] = _leading(hashes, depth, partial(self._is_here, worker))
        return Matches(expected, here)

    def _is_here(self, worker: WorkerKey, block_hash: Hashable) -> bool:
        return self._holders[block_hash][worker]

    def forget(self, worker: WorkerKey) -> None:
        """Drop a worker that is gone or lost its cache."""
        holding = self._holdings.get(worker)
        for block_hash in list(holding.tokens) if holding is not None else ():
            self._drop(block_hash, worker)
        self._holdings.pop(worker, None)

    def clear(self) -> None:
        self._holders.clear()
        self._holdings.clear()
        self._num_held = 0


def _leading(hashes: Sequence[Hashable], stop: int, is_held: Callable[[Hashable], bool]) -> int:
    """How many of the first `stop` are held, where the first is and no held one follows one that is not."""
    if is_held(hashes[stop - 1]):
        return stop
    low, high = 1, stop
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_held(hashes[middle - 1]) else (low, middle)
    return low
