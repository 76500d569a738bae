"""The one public function of paged attention: checks what it is given and chooses the implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...core.errors import InternalError
from . import padded
from .plan import AttentionPlan

Implementation = Callable[[torch.Tensor, torch.Tensor, int, AttentionPlan, float, int | None], torch.Tensor]

# A faster implementation for a kind of device (a Triton kernel for "cuda", a native one for "cpu") is named here; it
# reads
# the pool and the plan's arrays as they are. Without an entry a device uses torch's own parts.
_BY_DEVICE: dict[str, Implementation] = {}


def paged_attention(
    q: torch.Tensor, kv_pool: torch.Tensor, layer: int, plan: AttentionPlan, *, scale: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention of the new tokens over all tokens of their sequences, read through the block table.

    q [num_tokens, num_heads, head_dim], rows may be strided, float32 or the pool's type; kv_pool [num_blocks,
    num_layers, 2 (K, V), block_size, num_kv_heads, head_dim], contiguous, with the new tokens' keys and values already
    in it. Returns a tensor like q.
    `window`: a token sees the last `window` tokens, itself included; None for all. Unused slots of a sequence's
    blocks must be finite (`kv_write.clear_blocks`). Raises InternalError when shapes or types do not fit. Reference:
    `reference.paged_attention`.
    """
    _check(q, kv_pool, layer, plan, window)
    return _BY_DEVICE.get(q.device.type, padded.paged_attention)(q, kv_pool, layer, plan, scale, window)


def _check(q: torch.Tensor, kv_pool: torch.Tensor, layer: int, plan: AttentionPlan, window: int | None) -> None:
    num_tokens, num_heads, head_dim = q.shape
    _, num_layers, _, _, num_kv_heads, pool_head_dim = kv_pool.shape
    if num_tokens != plan.num_tokens:
        raise InternalError(f"q has {num_tokens} rows, the plan {plan.num_tokens} tokens")
    if head_dim != pool_head_dim or num_heads % num_kv_heads or q.dtype not in (kv_pool.dtype, torch.float32):
        raise InternalError(f"q is {list(q.shape)} {q.dtype}, the pool {list(kv_pool.shape)} {kv_pool.dtype}")
    if not 0 <= layer < num_layers:
        raise InternalError(f"layer {layer} of a pool with {num_layers} layers")
    if window not in (None, plan.window):
        raise InternalError(f"window {window}, the plan was made for {plan.window}")
