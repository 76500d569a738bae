"""The one public function of paged attention: checks what it is given and chooses the implementation."""

from __future__ import annotations

import torch

from ...core.errors import ConfigError, InternalError
from ..choice import runs_triton
from . import padded, reference
from .device_plan import DevicePlan
from .plan import SHORT_QUERY, AttentionPlan

Plan = AttentionPlan | DevicePlan
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

    q [num_tokens, num_heads, head_dim], rows may be strided, float32 or the pool's type; kv_pool [num_blocks,
    num_layers, 2 (K, V), block_size, num_kv_heads, head_dim], contiguous, with the new tokens' keys and values already
    in it. Returns a tensor like q.
    plan: for a CUDA device a DevicePlan, for others an AttentionPlan (or a DevicePlan, slowly: the reference takes it).
    `window`: a token sees the last `window` tokens, itself included; None for all. Unused slots of a sequence's
    blocks must be finite (`kv_write.clear_blocks`), except on a CUDA device, which never reads them.
    tree: which new tokens see which, int64 [num_tokens], as the module `tree` packs it; None for a chain, and for an
    AttentionPlan that was built with it.
    kv_scales: float32 [num_blocks, num_layers, 2 (K, V), num_kv_heads], by which the numbers of an int8 or
    float8_e4m3fn pool are multiplied; q may then be of any type. float8_e4m3fn takes a GPU of compute capability 8.9.
    Raises InternalError when shapes or types do not fit, ConfigError where Triton is needed and not installed.
    Reference: `reference.paged_attention`, which serves trees and 8-bit pools where there is no CUDA device.
    """
    _check(q, kv_pool, layer, plan, window)
    _check_tree(q, tree, window)
    _check_scales(kv_pool, kv_scales)
    if runs_triton(q):
        return _with_triton(q, kv_pool, layer, plan, scale, window, tree, kv_scales)
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
        from . import kernel
    except ModuleNotFoundError as err:
        raise ConfigError(f"attention on a CUDA device needs {err.name}; install penstock[gpu]") from err
    return kernel.paged_attention(q, kv_pool, layer, plan, scale, window, tree, kv_scales)


def _check(q: torch.Tensor, kv_pool: torch.Tensor, layer: int, plan: Plan, window: int | None) -> None:
    num_tokens, num_heads, head_dim = q.shape
    _, num_layers, _, block_size, num_kv_heads, pool_head_dim = kv_pool.shape
    if num_tokens != plan.num_tokens:
        raise InternalError(f"q has {num_tokens} rows, the plan {plan.num_tokens} tokens")
    fits = q.dtype in (kv_pool.dtype, torch.float32) or kv_pool.dtype in EIGHT_BITS
    if head_dim != pool_head_dim or num_heads % num_kv_heads or not fits:
        raise InternalError(f"q is {list(q.shape)} {q.dtype}, the pool {list(kv_pool.shape)} {kv_pool.dtype}")
    if not 0 <= layer < num_layers:
        raise InternalError(f"layer {layer} of a pool with {num_layers} layers")
    if isinstance(plan, DevicePlan):
        width = plan.block_table.shape[1]
        if plan.max_context_len > width * block_size:
            raise InternalError(f"a context of {plan.max_context_len} tokens in {width} blocks of {block_size}")
    elif window not in (None, plan.window):
        raise InternalError(f"window {window}, the plan was made for {plan.window}")


def _check_tree(q: torch.Tensor, tree: torch.Tensor | None, window: int | None) -> None:
    if tree is None:
        return
    if tree.shape != q.shape[:1] or tree.dtype != torch.int64 or not tree.is_contiguous():
        raise InternalError(f"tree is {list(tree.shape)} {tree.dtype}, not [{q.shape[0]}] torch.int64, contiguous")
    if window is not None and window < SHORT_QUERY:
        raise InternalError(f"a window of {window} tokens may cut a tree, which has up to {SHORT_QUERY}")


def _check_scales(kv_pool: torch.Tensor, kv_scales: torch.Tensor | None) -> None:
    num_blocks, num_layers, parts, _, num_kv_heads, _ = kv_pool.shape
    if (kv_pool.dtype in EIGHT_BITS) != (kv_scales is not None):
        raise InternalError(f"a pool of {kv_pool.dtype} {'without' if kv_scales is None else 'with'} scales")
    if kv_scales is None:
        return
    expected = [num_blocks, num_layers, parts, num_kv_heads]
    if list(kv_scales.shape) != expected or kv_scales.dtype != torch.float32 or not kv_scales.is_contiguous():
        raise InternalError(f"kv_scales are {list(kv_scales.shape)} {kv_scales.dtype}, not {expected} float32, dense")
