"""Keys and values of a draft head's rows, for many sequences: a slot each, contiguous, of bounded length.

A slot begins where its sequence began to decode here. What came before is not seen: the target's hidden states tell of
it. So nothing has to travel with a hand-off, and drafts behind one are those of a colocated worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FIRST_SLOTS = 4


@dataclass(slots=True)
class Slot:
    """rows: how many are kept; end: the position behind the last of them."""

    index: int
    rows: int = 0
    end: int = -1


class HeadCache:
    """`capacity` rows for each sequence, of which drafts take some for as long as they are made.

    pool: as paged attention reads it, with one block for each slot, [slots, 1, 2, capacity, num_kv_heads, head_dim].
    """

    def __init__(self, num_kv_heads: int, head_dim: int, capacity: int) -> None:
        self.capacity = capacity
        self.pool = torch.zeros(0, 1, 2, capacity, num_kv_heads, head_dim)
        self._free: list[int] = []

    def take(self) -> Slot:
        """An empty slot."""
        if not self._free:
            count = len(self.pool)
            more = self.pool.new_zeros(max(FIRST_SLOTS, count), *self.pool.shape[1:])
            self.pool = torch.cat((self.pool, more))
            self._free = list(range(len(self.pool) - 1, count - 1, -1))
        return Slot(self._free.pop())

    def give_back(self, slot: Slot) -> None:
        self._free.append(slot.index)

    @property
    def num_taken(self) -> int:
        return len(self.pool) - len(self._free)

    def make_room(self, slot: Slot, num_rows: int) -> None:
        """For so many rows more: where there is none, the newer half of the rows stays."""
        if slot.rows + num_rows <= self.capacity:
            return
        keep = min(slot.rows, self.capacity // 2)
        kept = self.pool[slot.index, 0]
        kept[:, :keep] = kept[:, slot.rows - keep : slot.rows].clone()
        slot.rows = keep
