"""Where a number lies in the pool, in plain numpy: the twin of `key_loop.slot_offsets` and `key_loop.scale_offsets`.

A pool holds more than 2^31 elements, so offsets are int64 from the block id on. Kept apart from the kernels so that
the arithmetic can be checked without memory of that size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .plan import Ints


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """The sizes of a pool [num_blocks, num_layers, 2 (K, V), block_size, num_kv_heads, head_dim]."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int


def slot_offsets(block_ids: Ints, layer: int, part: int, slots: Ints, head: int, layout: PoolLayout) -> Ints:
    """Elements from the pool's start to the first dimension of a head.

    part: 0 for the key, 1 for the value. slots: places inside the blocks, in [0, block_size).
    """
    slot_width = layout.num_kv_heads * layout.head_dim
    part_width = layout.block_size * slot_width
    block_width = layout.num_layers * 2 * part_width
    inside = (2 * layer + part) * part_width + slots.astype(np.int64) * slot_width + head * layout.head_dim
    return block_ids.astype(np.int64) * block_width + inside


def scale_offsets(block_ids: Ints, layer: int, part: int, head: int, layout: PoolLayout) -> Ints:
    """Elements from the start of the scales [num_blocks, num_layers, 2 (K, V), num_kv_heads] of an 8-bit pool."""
    block_width = layout.num_layers * 2 * layout.num_kv_heads
    return block_ids.astype(np.int64) * block_width + (2 * layer + part) * layout.num_kv_heads + head
