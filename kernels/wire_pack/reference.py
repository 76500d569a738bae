"""Blocks to wire blocks and back, one layer after the other, by the reference of the wire formats."""

from __future__ import annotations

import torch

from ..wire_format import reference


def pack(kv_pool: torch.Tensor, block_ids: torch.Tensor, first_layer: int, out: torch.Tensor, wire_dtype: str) -> None:
    """As `op.pack`."""
    for place in range(out.shape[1] if len(block_ids) else 0):
        out[:, place] = reference.encode(kv_pool[block_ids, first_layer + place], wire_dtype)


def unpack(
    data: torch.Tensor, kv_pool: torch.Tensor, block_ids: torch.Tensor, first_layer: int, wire_dtype: str
) -> None:
    """As `op.unpack`."""
    shape = torch.Size((len(block_ids), *kv_pool.shape[2:]))
    for place in range(data.shape[1] if len(block_ids) else 0):
        decoded = reference.decode(data[:, place], shape, kv_pool.dtype, wire_dtype)
        kv_pool[block_ids, first_layer + place] = decoded


def part_offset(block: int, layer: int, part: int, shape: torch.Size) -> int:
    """Elements from the pool's start to the keys (part 0) or values (1) of a block's layer: the kernel's twin."""
    _, num_layers, _, block_size, num_kv_heads, head_dim = shape
    return ((block * num_layers + layer) * 2 + part) * block_size * num_kv_heads * head_dim
