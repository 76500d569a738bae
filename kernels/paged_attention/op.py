"""The one public function of paged attention: checks what it is given and chooses the implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...core.errors import ConfigError, InternalError
from . import padded, reference
from .device_plan import DevicePlan
from .plan import SHORT_QUERY, AttentionPlan

Plan = AttentionPlan | DevicePlan
# q, kv_pool, layer, plan, scale, window, tree, kv_scales: as in `paged_attention`.
Implementation = Callable[
    [torch.Tensor, torch.Tensor, int, Plan, float, int | None, torch.Tensor | None, torch.Tensor | None], torch.Tensor
]
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


def paged_attention(
    q: torch.Tensor,
    kv_pool: torch.Tensor,
    layer: int,
    plan: Plan,
    *,
    scale: float,
    window: int | None = None,
    tree: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the new tokens over all tokens of their sequences, read through the block table.

    q [num_tokens, num_heads, head_dim], rows may be strided; kv_pool [num_blocks, num_layers, 2 (K, V), block_size,
    num_kv_heads, head_dim], contiguous, with the new tokens' keys and values already in it. Returns a tensor like q.
    plan: an AttentionPlan on the host; on a CUDA device a DevicePlan.
    `window`: a token sees the last `window` tokens, itself included; None for all. Unused slots of a sequence's
    blocks must be finite (`kv_write.clear_blocks`).
    tree: which new tokens see which, int64 [num_tokens], as in `tree`; None for a chain.
    kv_scales: float32 [num_blocks, num_layers, 2 (K, V), num_kv_heads], by which an int8 or float8_e4m3fn pool's
    numbers are multiplied.
    Raises InternalError when shapes or types do not fit, ConfigError where triton is needed and not installed.
    Reference: `reference.paged_attention`.
    """
    _check(q, kv_pool, layer, plan, window)
    _check_tree(q, tree, window)
    _check_scales(kv_pool, kv_scales)
    implementation = _BY_DEVICE.get(q.device.type, _with_torch)
    return implementation(q, kv_pool, layer, plan, scale, window, tree, kv_scales)


def _with_torch(
    q: torch.Tensor,
    kv_pool: torch.Tensor,
    layer: int,
    plan: Plan,
    scale: float,
    window: int | None,
    tree: torch.Tensor | None,
    kv_scales: torch.Tensor | None,
) -> torch.Tensor:
    """Torch's own parts; for trees and 8-bit pools, which these do not know, the reference."""
    if isinstance(plan, AttentionPlan) and tree is None and kv_scales is None:
        return padded.paged_attention(q, kv_pool, layer, plan, scale, window)
    return reference.paged_attention(q, kv_pool, layer, plan, scale, window, tree, kv_scales)


def _with_triton(
    q: torch.Tensor,
    kv_pool: torch.Tensor,
    layer: int,
    plan: Plan,
    scale: float,
    window: int | None,
    tree: torch.Tensor | None,
    kv_scales: torch.Tensor | None,
) -> torch.Tensor:
    if not isinstance(plan, DevicePlan):
        raise InternalError("on a CUDA device attention takes a DevicePlan; build it with `device_plan.PlanBuffers`")
    try:
        from . import kernel  # triton is an extra: only who runs on a GPU has it
    except ModuleNotFoundError as err:
        raise ConfigError(f"attention on a CUDA device needs {err.name}; install penstock[gpu]") from err
    return kernel.paged_attention(q, kv_pool, layer, plan, scale, window, tree, kv_scales)


# A faster implementation for a kind of device is named here; it reads the pool and the plan's arrays as they are.
# Without an entry a device uses torch's own parts.
_BY_DEVICE: dict[str, Implementation] = {"cuda": _with_triton}


def _check(q: torch.Tensor, kv_pool: torch.Tensor, layer: int, plan: Plan, window: int | None) -> None:
    num_tokens, num_heads, head_dim = q.shape
    _, num_layers, _, block_size, num_kv_heads, pool_head_dim = kv_pool.shape
    if num_tokens != plan.num_tokens:
        raise InternalError(f"q has {num_tokens} rows, the plan {plan.num_tokens} tokens")
    fits = q.dtype == kv_pool.dtype or kv_pool.dtype in EIGHT_BITS
    if head_dim != pool_head_dim or num_heads % num_kv_heads or not fits:
        raise InternalError(f"q is {list(q.shape)} {q.dtype}, the pool {list(kv_pool.shape)} {kv_pool.dtype}")
    if not 0 <= layer < num_layers:
        raise InternalError(f"layer {layer} of a pool with {num_layers} layers")
    if isinstance(plan, DevicePlan):
        if plan.max_context_len > plan.block_table.shape[1] * block_size:
            raise InternalError(
                f"a context of {plan.max_context_len} tokens in {plan.block_table.shape[1]} blocks of {block_size}"
            )
    elif window not in (None, plan.window):
        raise InternalError(f"window {window}, the plan was made for {plan.window}")


def _check_tree(q: torch.Tensor, tree: torch.Tensor | None, window: int | None) -> None:
    if tree is None:
        return
    if tree.shape != q.shape[:1] or tree.dtype != torch.int64:
        raise InternalError(f"tree is {list(tree.shape)} {tree.dtype}, not [{q.shape[0]}] torch.int64")
    if window is not None and window < SHORT_QUERY:
        raise InternalError(f"a window of {window} tokens may cut a tree, which has up to {SHORT_QUERY}")


def _check_scales(kv_pool: torch.Tensor, kv_scales: torch.Tensor | None) -> None:
    num_blocks, num_layers, parts, _, num_kv_heads, _ = kv_pool.shape
    expected = (num_blocks, num_layers, parts, num_kv_heads) if kv_pool.dtype in EIGHT_BITS else None
    given = None if kv_scales is None else tuple(kv_scales.shape)
    if given != expected or (kv_scales is not None and kv_scales.dtype != torch.float32):
        dtype = None if kv_scales is None else kv_scales.dtype
        raise InternalError(f"kv_scales are {given} {dtype}, a pool of {kv_pool.dtype} takes {expected} in float32")
