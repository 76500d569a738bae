"""The paged KV cache as a tensor, and its two flat views."""

from __future__ import annotations

import torch


class KVPool:
    """cache [num_blocks, num_layers, 2 (K, V), block_size, num_kv_heads, head_dim], contiguous, block-major.

    `rows` [num_blocks · num_layers · 2 · block_size, num_kv_heads · head_dim] is one row for each token, layer and K or V: the view
    for writing. `blocks` [num_blocks · num_layers · 2, block_size, num_kv_heads, head_dim] is the view for gathering whole blocks.
    """

    def __init__(self, cache: torch.Tensor) -> None:
        if cache.dim() != 6 or cache.shape[2] != 2 or not cache.is_contiguous():
            raise ValueError(f"cache: shape {tuple(cache.shape)} is not a contiguous [blocks, layers, 2, block_size, heads, head_dim]")
        self.num_blocks, self.num_layers, _, self.block_size, self.num_kv_heads, self.head_dim = cache.shape
        self.cache = cache
        self.rows = cache.view(-1, self.num_kv_heads * self.head_dim)
        self.blocks = cache.view(-1, self.block_size, self.num_kv_heads, self.head_dim)
