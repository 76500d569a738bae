"""Paged attention out of torch's own parts: gather the blocks, then one padded fused attention for each bucket of the
plan.

A bucket's q is laid out [batch, num_kv_heads, queries · group, head_dim]: the query heads that share a KV head become
queries of it, so keys are read once for all of them, and torch's fused CPU kernel takes it as it is.

Scores of padding are -inf, so its weights are 0; but 0 · NaN is NaN. Hence what padding reads must be finite: a
padded table entry names a block of the same sequence, and the slots behind a sequence's last token were zeroed when
the step entered the block (`kv_write.clear_blocks`). What another request left in the pool is never read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .plan import AttentionPlan, LongQuery, ShortQueries


def paged_attention(
    q: torch.Tensor, kv_pool: torch.Tensor, layer: int, plan: AttentionPlan, scale: float, window: int | None = None
) -> torch.Tensor:
    """As `op.paged_attention`."""
    if len(plan.short) == 1 and not plan.long and isinstance(plan.short[0].rows, slice):
        bucket = plan.short[0]
        return _attend_short(
            q, _gather(kv_pool, layer, bucket.block_rows, bucket.batch, q.dtype), bucket, scale, window
        )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for bucket in plan.short:
        keys_values = _gather(kv_pool, layer, bucket.block_rows, bucket.batch, q.dtype)
        _put(out, bucket, _attend_short(q[bucket.rows], keys_values, bucket, scale, window))
    for query in plan.long:
        keys_values = _gather(kv_pool, layer, query.block_rows, 1, q.dtype)
        _attend_long(q, keys_values, query, scale, window, out)
    return out


def _gather(
    kv_pool: torch.Tensor, layer: int, block_rows: torch.Tensor, batch: int, dtype: torch.dtype
) -> torch.Tensor:
    """[2 (K, V), batch, num_kv_heads, keys, head_dim], a view of blocks copied side by side."""
    _, _, _, block_size, num_kv_heads, head_dim = kv_pool.shape
    blocks = kv_pool.view(-1, block_size * num_kv_heads * head_dim)[2 * layer :].index_select(0, block_rows).to(dtype)
    return blocks.view(2, batch, -1, num_kv_heads, head_dim).transpose(2, 3)


def _put(out: torch.Tensor, bucket: ShortQueries, attended: torch.Tensor) -> None:
    """A bucket's results into q's order, without those of padding."""
    if isinstance(bucket.rows, slice):
        out[bucket.rows] = attended
    elif bucket.kept is None:
        out.index_copy_(0, bucket.rows, attended)
    else:
        out.index_copy_(0, bucket.rows[bucket.kept], attended[bucket.kept])


def _attend_short(
    q: torch.Tensor, keys_values: torch.Tensor, bucket: ShortQueries, scale: float, window: int | None
) -> torch.Tensor:
    """q [batch · query_len, num_heads, head_dim] → the same shape."""
    shape = q.shape
    batch, query_len, num_kv_heads, head_dim = bucket.batch, bucket.query_len, keys_values.shape[2], shape[2]
    folded = q.reshape(batch, query_len, num_kv_heads, -1, head_dim).transpose(1, 2)
    attended = F.scaled_dot_product_attention(
        folded.reshape(batch, num_kv_heads, -1, head_dim),
        keys_values[0],
        keys_values[1],
        attn_mask=bucket.mask if window is None else bucket.window_mask,
        scale=scale,
    )
    return attended.view(batch, num_kv_heads, query_len, -1, head_dim).transpose(1, 2).reshape(shape)


def _attend_long(
    q: torch.Tensor, keys_values: torch.Tensor, query: LongQuery, scale: float, window: int | None, out: torch.Tensor
) -> None:
    """Fill out[start:stop], tile by tile.

    KV heads take the place of the batch, so that their keys are shared by a stride of 0.
    """
    num_tokens = query.stop - query.start
    num_kv_heads, num_keys, head_dim = keys_values.shape[2:]
    group = q.shape[1] // num_kv_heads
    heads = (num_tokens, num_kv_heads, group, head_dim)
    queries = q[query.start : query.stop].view(heads).permute(1, 2, 0, 3)
    results = out[query.start : query.stop].view(heads).permute(1, 2, 0, 3)
    k, v = keys_values[:, 0].unsqueeze(2).expand(2, num_kv_heads, group, num_keys, head_dim)
    for tile in query.tiles if window is None else query.window_tiles:
        results[:, :, tile.start : tile.stop] = F.scaled_dot_product_attention(
            queries[:, :, tile.start : tile.stop],
            k[:, :, tile.key_start : tile.key_stop],
            v[:, :, tile.key_start : tile.key_stop],
            attn_mask=tile.mask,
            scale=scale,
        )
