"""Paged attention on a GPU: short sequences by `decode_kernel`, long ones by `prefill_kernel`.

Importing this needs triton. The head of each kernel's module says what one program does and what bounds it.
"""

from __future__ import annotations

import torch

from ...core.errors import InternalError
from ..choice import check_same_device
from .call import Call
from .decode_kernel import attend_short
from .device_plan import DevicePlan
from .prefill_kernel import attend_long

MAX_GROUP = 32  # query heads that share a KV head; a tile of a prompt holds at least one token of all of them


def paged_attention(
    q: torch.Tensor,
    kv_pool: torch.Tensor,
    layer: int,
    plan: DevicePlan,
    scale: float,
    window: int | None = None,
    tree: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `op.paged_attention`, which has checked shapes and types. Unused slots may hold anything."""
    check_same_device(q=q, kv_pool=kv_pool, tree=tree, kv_scales=kv_scales, block_table=plan.block_table)
    if q.shape[1] // kv_pool.shape[4] > MAX_GROUP:
        raise InternalError(
            f"{q.shape[1]} query heads for {kv_pool.shape[4]} KV heads: more than {MAX_GROUP} share one"
        )
    if q.stride(2) != 1 or not kv_pool.is_contiguous():
        raise InternalError("the numbers of a head in q, and the whole pool, have to be dense")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    call = Call(q, kv_pool, kv_scales, tree, out, plan, layer, scale, window)
    if len(plan.short_seqs):
        attend_short(call)
    if len(plan.long_seqs):
        attend_long(call)
    return out
