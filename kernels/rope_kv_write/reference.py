"""Rotary embedding (Su et al., RoFormer, 2021) and the write into the cache, one token or one block at a time."""

from __future__ import annotations

from itertools import groupby

import torch

from .layout import LARGEST, CacheLayer, Rotation


def rope_kv_write(
    qkv: torch.Tensor, num_heads: int, rotation: Rotation | None, cache: CacheLayer, slot_mapping: torch.Tensor
) -> None:
    """As `op.rope_kv_write`."""
    num_kv_heads, head_dim = cache.kv_pool.shape[4:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.float().tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
    if rotation is not None:
        q, k = rotated(q, rotation), rotated(k, rotation)
        heads[:, :num_heads] = q.to(qkv.dtype)
    block_size = cache.kv_pool.shape[3]
    stored = [(token, *divmod(slot, block_size)) for token, slot in enumerate(slot_mapping.tolist()) if slot >= 0]
    for block, run in groupby(stored, key=lambda item: item[1]):
        tokens, _, offsets = map(list, zip(*run, strict=True))
        for part, values in enumerate((k, v)):
            _store(values[tokens], offsets, block, part, cache)


def rotated(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """x [num_tokens, heads, head_dim] float32; dimension i turns with its partner i + head_dim/2."""
    cos, sin = (table[rotation.positions].unsqueeze(1) for table in (rotation.cos, rotation.sin))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _store(values: torch.Tensor, offsets: list[int], block: int, part: int, cache: CacheLayer) -> None:
    """values [n, num_kv_heads, head_dim] float32 into the slots at `offsets` of one block."""
    place = cache.kv_pool[block, cache.layer, part]
    if cache.scales is None:
        place[offsets] = values.to(place.dtype)
        return
    scales = cache.scales[block, cache.layer, part]
    for head in range(place.shape[1]):
        old = scales[head] if offsets[0] else torch.zeros(())
        new = grown_scale(old, values[:, head], place.dtype)
        earlier = place[: offsets[0], head]
        if new != old:
            place[: offsets[0], head] = quantised(earlier.float() * old, new, place.dtype)
        place[offsets, head] = quantised(values[:, head], new, place.dtype)
        scales[head] = new


def grown_scale(old: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale that holds `values` too."""
    largest = values.abs().max()
    if old.isnan() or not largest.isfinite():
        return torch.tensor(torch.nan)
    needed = largest / LARGEST[dtype]
    if dtype == torch.float8_e4m3fn and needed > 0:
        mantissa, exponent = torch.frexp(needed)  # mantissa in [0.5, 1)
        exponent = exponent - (mantissa == 0.5).int()
        needed = torch.ldexp(torch.ones(()), exponent.clamp(min=-126))
    return torch.maximum(old, needed)


def quantised(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest codes, the even one of two; zeros where the scale is NaN and says all."""
    if scale.isnan():
        return torch.zeros(values.shape).to(dtype)
    quotients = (values / (scale if scale > 0 else 1.0)).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (quotients.round() if dtype == torch.int8 else quotients).to(dtype)
