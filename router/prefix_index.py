"""Which workers probably hold the KV of which prompt prefix: a guess from what was sent to them, never a promise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ..core.ids import WorkerKey
from ..core.prefix_hash import BlockHash

MAX_WORKERS_PER_BLOCK = 8


class PrefixIndex:
    """Block hash → workers, at most `max_blocks` hashes, least recently used out first."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._holders: OrderedDict[BlockHash, dict[WorkerKey, None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def insert(self, hashes: Sequence[BlockHash], worker: WorkerKey) -> None:
        """Note that `worker` will hold these leading blocks of a prompt, or of a prompt and its answer."""
        # Last block first, so that the head of a prompt is the youngest entry: a tail without its head matches nothing.
        for block_hash in reversed(hashes[: self._max_blocks]):
            holders = self._holders.setdefault(block_hash, {})
            holders.pop(worker, None)
            holders[worker] = None
            if len(holders) > MAX_WORKERS_PER_BLOCK:
                del holders[next(iter(holders))]
            self._holders.move_to_end(block_hash)
        while len(self._holders) > self._max_blocks:
            self._holders.popitem(last=False)

    def match(self, hashes: Sequence[BlockHash]) -> dict[WorkerKey, int]:
        """For each worker that holds any, how many leading blocks it holds without a hole."""
        matched: dict[WorkerKey, int] = {}
        for depth, block_hash in enumerate(hashes):
            holders = self._holders.get(block_hash, {})
            going_on = [worker for worker in holders if matched.get(worker, 0) == depth]
            if not going_on:
                break
            for worker in going_on:
                matched[worker] = depth + 1
        return matched

    def forget(self, worker: WorkerKey) -> None:
        """Drop a worker that is gone or lost its cache."""
        emptied = []
        for block_hash, holders in self._holders.items():
            holders.pop(worker, None)
            if not holders:
                emptied.append(block_hash)
        for block_hash in emptied:
            del self._holders[block_hash]

    def clear(self) -> None:
        self._holders.clear()
