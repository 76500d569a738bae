"""Which workers hold which cached blocks, by their own word: exact, as of the last news of each (`protocol.BlockNews`).

A block is a name of 8 bytes; its holders are the bits of one number, so an entry is two numbers in a dict. At the bound
the eighth that was first heard of goes: such blocks count as held by nobody until they are told again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from ..core.ids import WorkerKey

DROPPED_SHARE = 8  # of the entries, one in so many goes at the bound


class BlockIndex:
    """At most `max_blocks` names, whatever workers say."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._holders: dict[int, int] = {}  # name → bits of those who hold it
        self._bits: dict[WorkerKey, int] = {}
        self.num_dropped = 0  # at the bound, since the start

    def __len__(self) -> int:
        return len(self._holders)

    def store(self, worker: WorkerKey, names: Iterable[int]) -> None:
        """`worker` holds these blocks from now on."""
        bit, holders = self._bit_of(worker), self._holders
        for name in names:
            found = holders.get(name)
            if found is None and len(holders) >= self._max_blocks:
                self._drop_oldest()
            holders[name] = bit if found is None else found | bit

    def remove(self, worker: WorkerKey, names: Iterable[int]) -> None:
        """`worker` holds these no more. Unknown ones are ignored."""
        bit, holders = self._bit_of(worker), self._holders
        for name in names:
            left = holders.get(name, 0) & ~bit
            if left:
                holders[name] = left
            else:
                holders.pop(name, None)

    def forget(self, worker: WorkerKey) -> None:
        """`worker` is gone, or what is known of it is in doubt."""
        bit = self._bits.pop(worker, 0)
        if not bit:
            return
        self._holders = {name: left for name, bits in self._holders.items() if (left := bits & ~bit)}

    def match(self, names: Sequence[int]) -> dict[WorkerKey, int]:
        """For each worker that holds the first of these, how many leading ones it holds without a hole."""
        alive = self._holders.get(names[0], 0) if names else 0
        workers = [(worker, bit) for worker, bit in self._bits.items() if alive & bit]
        depths = {worker: len(names) for worker, _ in workers}
        for place in range(1, len(names)):
            still = alive & self._holders.get(names[place], 0)
            if still != alive:
                depths.update({worker: place for worker, bit in workers if alive & bit and not still & bit})
                alive = still
                if not alive:
                    break
        return depths

    def _bit_of(self, worker: WorkerKey) -> int:
        if worker not in self._bits:
            taken, bit = set(self._bits.values()), 1
            while bit in taken:
                bit <<= 1
            self._bits[worker] = bit
        return self._bits[worker]

    def _drop_oldest(self) -> None:
        for name in list(islice(self._holders, 1 + self._max_blocks // DROPPED_SHARE)):
            del self._holders[name]
            self.num_dropped += 1
