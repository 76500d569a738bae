"""Storing the keys and values of a step in the pool.

The pool is [num_blocks, num_layers, 2 (K, V), block_size, num_kv_heads, head_dim], contiguous. A token's key is one
row of num_kv_heads · head_dim numbers, its value the row `block_size` further on. `kv_rows` finds these rows once for
a step, counted from the layer's first row, so all layers share them.
"""

from __future__ import annotations

import torch

from ...core.errors import InternalError


def kv_rows(slot_mapping: torch.Tensor, kv_pool: torch.Tensor) -> torch.Tensor:
    """Rows of key and value for each token, [2 · num_tokens], in the order K, V, K, V.

    slot_mapping [num_tokens] int64.
    """
    _, num_layers, _, block_size, _, _ = kv_pool.shape
    blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")
    key_rows = slot_mapping + blocks * (block_size * (2 * num_layers - 1))
    return torch.stack((key_rows, key_rows + block_size), dim=1).flatten()


def store_kv(kv: torch.Tensor, kv_pool: torch.Tensor, layer: int, rows: torch.Tensor) -> None:
    """Write kv [num_tokens, 2 (K, V), num_kv_heads · head_dim] into one layer, at the `rows` from `kv_rows`.

    Raises InternalError when shapes or types do not fit. Reference: `reference.store_kv`.
    """
    _, _, _, block_size, num_kv_heads, head_dim = kv_pool.shape
    width = num_kv_heads * head_dim
    if kv.shape != (rows.shape[0] // 2, 2, width) or kv.dtype != kv_pool.dtype:
        raise InternalError(
            f"kv is {list(kv.shape)} {kv.dtype}, the pool takes [{rows.shape[0] // 2}, 2, {width}] {kv_pool.dtype}"
        )
    layer_rows = kv_pool.view(-1, width)[2 * block_size * layer :]
    layer_rows.index_copy_(0, rows, kv.reshape(-1, width))


def move_kv(kv_pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy all layers' keys and values of the slots `sources` to the slots `targets`, [n] int64; all are read before
    any is written. Reference: `reference.move_kv`.
    """
    block_size = kv_pool.shape[3]
    kept = kv_pool[sources // block_size, :, :, sources % block_size]
    kv_pool[targets // block_size, :, :, targets % block_size] = kept


def clear_blocks(kv_pool: torch.Tensor, block_ids: torch.Tensor) -> None:
    """Zero all layers of these blocks; block_ids [n] int64.

    Done for a block that a step enters and does not fill: what another request left there is gone before anyone reads
    or sends the block, and the slots still to come hold numbers that attention can multiply by zero.
    """
    kv_pool.view(kv_pool.shape[0], -1).index_fill_(0, block_ids, 0)
