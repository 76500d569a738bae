"""Which prefix blocks a simulated worker retains: least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, prefix_ids: Sequence[int]) -> int:
        """Leading blocks that are there; they become the youngest."""
        found = 0
        while found < len(prefix_ids) and prefix_ids[found] in self._blocks:
            found += 1
        for prefix_id in reversed(prefix_ids[:found]):
            self._blocks.move_to_end(prefix_id)
        return found

    def add(self, prefix_ids: Sequence[int], room: int) -> None:
        """Retain these blocks, at most `room` in all. A tail goes before its head."""
        for prefix_id in reversed(prefix_ids):
            self._blocks[prefix_id] = None
            self._blocks.move_to_end(prefix_id)
        while len(self._blocks) > max(0, room):
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        self._blocks.clear()
