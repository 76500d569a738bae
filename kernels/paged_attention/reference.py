"""Paged attention one sequence, one head and one query at a time, in float32:

the truth for every other implementation.
"""

from __future__ import annotations

import torch

from .plan import AttentionPlan


def paged_attention(
    q: torch.Tensor, kv_pool: torch.Tensor, layer: int, plan: AttentionPlan, scale: float, window: int | None = None
) -> torch.Tensor:
    """As `op.paged_attention`. Reads the slots of a sequence's own tokens and nothing else."""
    out = torch.empty_like(q)
    for index, context_len in enumerate(plan.context_lens.tolist()):
        start, stop = plan.cu_seqlens_q[index : index + 2].tolist()
        k, v = _read_kv(kv_pool, layer, plan.block_table[index].tolist(), context_len)
        for row in range(start, stop):
            position = context_len - (stop - row)
            first = 0 if window is None else max(0, position - window + 1)
            out[row] = _attend(q[row].float(), k[first : position + 1], v[first : position + 1], scale).to(q.dtype)
    return out


def _read_kv(
    kv_pool: torch.Tensor, layer: int, block_ids: list[int], context_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [context_len, num_kv_heads, head_dim] in float32."""
    block_size = kv_pool.shape[3]
    slots = [(block_ids[i // block_size], i % block_size) for i in range(context_len)]
    k = torch.stack([kv_pool[block, layer, 0, offset] for block, offset in slots])
    v = torch.stack([kv_pool[block, layer, 1, offset] for block, offset in slots])
    return k.float(), v.float()


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [num_heads, head_dim] over k, v [n, num_kv_heads, head_dim]."""
    group = q.shape[0] // k.shape[1]
    heads = []
    for head in range(q.shape[0]):
        weights = torch.softmax(k[:, head // group] @ q[head] * scale, dim=0)
        heads.append(weights @ v[:, head // group])
    return torch.stack(heads)
