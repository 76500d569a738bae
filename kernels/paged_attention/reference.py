"""Paged attention one sequence, one head and one query at a time, in float32:

the truth for every other implementation.
"""

from __future__ import annotations

import torch

from .device_plan import DevicePlan
from .plan import SHORT_QUERY, AttentionPlan


def paged_attention(
    q: torch.Tensor,
    kv_pool: torch.Tensor,
    layer: int,
    plan: AttentionPlan | DevicePlan,
    scale: float,
    window: int | None = None,
    tree: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `op.paged_attention`. Reads the slots of a sequence's own tokens and nothing else."""
    out = torch.zeros_like(q)
    for index, context_len in enumerate(plan.context_lens.tolist()):
        start, stop = plan.cu_seqlens_q[index : index + 2].tolist()
        if context_len == 0:  # padding
            continue
        k, v = _read_kv(kv_pool, kv_scales, layer, plan.block_table[index].tolist(), context_len)
        earlier = context_len - (stop - start)
        for row in range(start, stop):
            bits = None if tree is None or stop - start > SHORT_QUERY else int(tree[row])
            keys = _visible_keys(earlier, row - start, window, bits)
            out[row] = _attend(q[row].float(), k[keys], v[keys], scale).to(q.dtype)
    return out


def _visible_keys(earlier: int, query: int, window: int | None, tree_bits: int | None) -> list[int]:
    """Keys that the new token `query` of a sequence with `earlier` older tokens sees; `tree_bits` as in `tree`."""
    seen = [new for new in range(query + 1) if tree_bits is None or tree_bits >> new & 1]
    older = range(earlier) if window is None else range(max(0, earlier + len(seen) - window), earlier)
    return [*older, *(earlier + new for new in (seen if window is None else seen[-window:]))]


def _read_kv(
    kv_pool: torch.Tensor, kv_scales: torch.Tensor | None, layer: int, block_ids: list[int], context_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [context_len, num_kv_heads, head_dim] in float32."""
    block_size = kv_pool.shape[3]
    slots = [(block_ids[i // block_size], i % block_size) for i in range(context_len)]

    def read(part: int) -> torch.Tensor:
        rows = torch.stack([kv_pool[block, layer, part, offset].float() for block, offset in slots])
        if kv_scales is None:
            return rows
        return rows * torch.stack([kv_scales[block, layer, part] for block, _ in slots])[..., None]

    return read(0), read(1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [num_heads, head_dim] over k, v [n, num_kv_heads, head_dim]."""
    groups = q.view(k.shape[1], -1, q.shape[1])
    weights = torch.softmax(torch.einsum("kgd,nkd->kgn", groups, k) * scale, dim=-1)
    return torch.einsum("kgn,nkd->kgd", weights, v).reshape(q.shape)
