"""Storing keys and values in the pool, one token at a time."""

from __future__ import annotations

import torch


def store_kv(k: torch.Tensor, v: torch.Tensor, kv_pool: torch.Tensor, layer: int, slot_mapping: torch.Tensor) -> None:
    """k, v [num_tokens, num_kv_heads, head_dim]; kv_pool as in `op`; slot_mapping [num_tokens]."""
    block_size = kv_pool.shape[3]
    for token, slot in enumerate(slot_mapping.tolist()):
        block, offset = divmod(slot, block_size)
        kv_pool[block, layer, 0, offset] = k[token]
        kv_pool[block, layer, 1, offset] = v[token]


def move_kv(kv_pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """As `op.move_kv`."""
    block_size, before = kv_pool.shape[3], kv_pool.clone()
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        kept = before[source // block_size, :, :, source % block_size]
        kv_pool[target // block_size, :, :, target % block_size] = kept
