"""What the op is given, and where a number lies in the pool.

The pool is [num_blocks, num_layers, 2 (K, V), block_size, num_kv_heads, head_dim], contiguous. One of an 8-bit type has
scales [num_blocks, num_layers, 2 (K, V), num_kv_heads] float32 beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The largest number of each 8-bit type.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """The angles of all positions, cos and sin [max_positions, head_dim/2] float32, and where the tokens stand.

    positions [num_tokens] int64, each below max_positions; the kernel does not look.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CacheLayer:
    """One layer of a pool, and the pool's scales when it is of an 8-bit type."""

    kv_pool: torch.Tensor
    layer: int
    scales: torch.Tensor | None = None


def slot_offset(slot: int, layer: int, part: int, shape: torch.Size) -> int:
    """Elements from the pool's start to the first head of a token's key (part 0) or value (1): the kernel's twin."""
    _, num_layers, _, block_size, num_kv_heads, head_dim = shape
    block, offset = divmod(slot, block_size)
    return (((block * num_layers + layer) * 2 + part) * block_size + offset) * num_kv_heads * head_dim


def scale_offset(block: int, layer: int, part: int, shape: torch.Size) -> int:
    """Elements from the start of the scales to those of a block's keys or values; `shape` is the pool's."""
    _, num_layers, _, _, num_kv_heads, _ = shape
    return ((block * num_layers + layer) * 2 + part) * num_kv_heads
