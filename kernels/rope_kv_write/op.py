"""Rotating queries and keys and writing keys and values into the paged cache, in one pass.

A cache may be of the queries' own type or of an 8-bit one, FP8-E4M3 or INT8. Then a head of K or of V has one scale in
each block, and this rule keeps it right while the block fills:

- A block's first token begins it anew: what its scale was is forgotten.
- A scale never shrinks after that. When the tokens of a step bring a larger magnitude than it holds, it grows to what
  they need and the block's earlier codes are rescaled in the same step.
- For INT8 it is the block's largest magnitude so far / 127. Each growth rounds the earlier numbers again, by at most
  half a step, so after g of them a number is off by at most (g + 1)/2 steps of the last scale.
- For FP8 it is rounded up to a power of two. That costs an FP8 number no precision above its smallest normal, and
  rescaling by a power of two is exact down to there: growth loses nothing.
- A head that gets an infinity or a NaN has scale NaN until the block is begun anew, as on the wire.
"""

from __future__ import annotations

import torch

from ...core.errors import InternalError
from ..choice import check_same_device, runs_triton
from . import reference
from .layout import LARGEST, CacheLayer, Rotation


def rope_kv_write(
    qkv: torch.Tensor, num_heads: int, rotation: Rotation | None, cache: CacheLayer, slot_mapping: torch.Tensor
) -> None:
    """Rotate the queries in place; store the rotated keys and the values. What `qkv` holds of keys stays as it was.

    qkv [num_tokens, (num_heads + 2 · num_kv_heads) · head_dim]: queries, keys, values; rows may be strided.
    rotation: None for a layer that does not rotate. slot_mapping [num_tokens] int64, no slot twice; a token of slot -1
    (one that pads a step) is not stored. With an 8-bit pool the tokens of one block are neighbours in the step and
    ascend, as those of a sequence do. Raises InternalError. Reference: `reference.rope_kv_write`.
    """
    _check_qkv(qkv, num_heads, cache, slot_mapping)
    _check_cache(qkv, cache)
    if rotation is not None:
        _check_rotation(rotation, qkv, cache.kv_pool.shape[5])
    if not runs_triton(qkv):
        reference.rope_kv_write(qkv, num_heads, rotation, cache, slot_mapping)
        return
    from .kernel import launch

    launch(qkv, num_heads, rotation, cache, slot_mapping)


def _check_qkv(qkv: torch.Tensor, num_heads: int, cache: CacheLayer, slot_mapping: torch.Tensor) -> None:
    if cache.kv_pool.dim() != 6:
        raise InternalError(f"the pool is {list(cache.kv_pool.shape)}, not of 6 dimensions")
    num_kv_heads, head_dim = cache.kv_pool.shape[4:]
    width = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv.dim() != 2 or qkv.shape[1] != width or qkv.stride(1) != 1 or num_heads < 1 or head_dim % 2:
        raise InternalError(
            f"qkv is {list(qkv.shape)} at strides {list(qkv.stride())}; {num_heads} heads of queries and twice "
            f"{num_kv_heads} of {head_dim} take [num_tokens, {width}] in dense rows, with an even head_dim"
        )
    if slot_mapping.shape != qkv.shape[:1] or slot_mapping.dtype != torch.int64 or not slot_mapping.is_contiguous():
        raise InternalError(f"slot_mapping is {list(slot_mapping.shape)} {slot_mapping.dtype}, not [num_tokens] int64")


def _check_cache(qkv: torch.Tensor, cache: CacheLayer) -> None:
    pool, scales = cache.kv_pool, cache.scales
    if not 0 <= cache.layer < pool.shape[1]:
        raise InternalError(f"layer {cache.layer} of a pool with {pool.shape[1]} layers")
    if pool.shape[2] != 2 or not pool.is_contiguous():
        raise InternalError(f"the pool is {list(pool.shape)} at strides {list(pool.stride())}, not K and V, contiguous")
    if (pool.dtype in LARGEST) != (scales is not None) or pool.dtype not in (qkv.dtype, *LARGEST):
        has = "with" if scales is not None else "without"
        raise InternalError(f"the pool is {pool.dtype} {has} scales, qkv is {qkv.dtype}")
    if scales is not None:
        expected = (pool.shape[0], pool.shape[1], 2, pool.shape[4])
        if scales.shape != expected or scales.dtype != torch.float32 or not scales.is_contiguous():
            raise InternalError(f"scales are {list(scales.shape)} {scales.dtype}, not {list(expected)} float32")
    check_same_device(qkv=qkv, kv_pool=pool, scales=scales)


def _check_rotation(rotation: Rotation, qkv: torch.Tensor, head_dim: int) -> None:
    cos, sin, positions = rotation.cos, rotation.sin, rotation.positions
    for name, table in (("cos", cos), ("sin", sin)):
        expected = (cos.shape[0], head_dim // 2)
        if table.shape != expected or table.dtype != torch.float32 or not table.is_contiguous():
            raise InternalError(f"{name} is {list(table.shape)} {table.dtype}, not {list(expected)} float32")
    if positions.shape != qkv.shape[:1] or positions.dtype != torch.int64 or not positions.is_contiguous():
        raise InternalError(f"positions are {list(positions.shape)} {positions.dtype}, not [num_tokens] int64")
    check_same_device(qkv=qkv, cos=cos, sin=sin, positions=positions)
