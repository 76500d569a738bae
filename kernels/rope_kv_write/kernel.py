"""Rotation of queries and keys and the write of keys and values into the paged cache, in Triton.

`_rotate_and_store`: grid (tokens, 3). A program rotates a token's queries in place (0), rotates its keys into the pool
(1) or copies its values there (2). An 8-bit pool takes only the first of them, and then `_store_scaled`: grid
(tokens, 2 · KV heads). The program of the first token of a run in one block does that whole run for one head of K or
of V, because they share a scale; the programs of the other tokens end at once. So no two programs touch one scale.

Roofline: a few operations a number; bound by memory. Read: all of qkv, 4 · head_dim bytes of angles a token. Written:
the queries and the cache entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..choice import next_power_of_two
from ..triton_parts import code_numbers, largest_magnitude, row_offset, scaled_codes
from .layout import LARGEST, CacheLayer, Rotation


def launch(
    qkv: torch.Tensor, num_heads: int, rotation: Rotation | None, cache: CacheLayer, slot_mapping: torch.Tensor
) -> None:
    """As `op.rope_kv_write`, checked."""
    num_tokens = qkv.shape[0]
    if not num_tokens:
        return
    pool, scales = cache.kv_pool, cache.scales
    _, num_layers, _, block_size, num_kv_heads, head_dim = pool.shape
    angles = (None, None, None) if rotation is None else (rotation.cos, rotation.sin, rotation.positions)
    codes = pool if scales is None else pool.view(torch.uint8)
    sizes = {
        "NUM_LAYERS": num_layers,
        "BLOCK_SIZE": block_size,
        "NUM_KV_HEADS": num_kv_heads,
        "HALF": head_dim // 2,
        "DIMS": next_power_of_two(head_dim // 2),
    }
    _rotate_and_store[(num_tokens, 3 if scales is None else 1)](
        qkv,
        *angles,
        codes,
        slot_mapping,
        qkv.stride(0),
        cache.layer,
        NUM_HEADS=num_heads,
        HEADS=next_power_of_two(num_heads),
        KV_HEADS=next_power_of_two(num_kv_heads),
        **sizes,
    )
    if scales is not None:
        _store_scaled[(num_tokens, 2 * num_kv_heads)](
            qkv[:, num_heads * head_dim :],
            *angles,
            codes,
            scales,
            slot_mapping,
            qkv.stride(0),
            cache.layer,
            num_tokens,
            LARGEST=LARGEST[pool.dtype],
            IS_FP8=pool.dtype == torch.float8_e4m3fn,
            ROWS=next_power_of_two(block_size),
            **sizes,
        )


@triton.jit
def slot_offset(slot, layer, part, NUM_LAYERS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SLOT_WIDTH: tl.constexpr):
    """As `layout.slot_offset`."""
    block = (slot // BLOCK_SIZE).to(tl.int64)
    return (((block * NUM_LAYERS + layer) * 2 + part) * BLOCK_SIZE + slot % BLOCK_SIZE) * SLOT_WIDTH


@triton.jit
def scale_offset(block, layer, part, NUM_LAYERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr):
    """As `layout.scale_offset`."""
    return ((block.to(tl.int64) * NUM_LAYERS + layer) * 2 + part) * NUM_KV_HEADS


@triton.jit
def _turned(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _token_heads(qkv, token, first_head, heads, cos, sin, positions, HALF: tl.constexpr, DIMS: tl.constexpr):
    """A token's heads [heads, HALF] twice, for either half of the dimensions, rotated when there are angles."""
    dim = tl.arange(0, DIMS)[None, :]
    inside = heads & (dim < HALF)
    place = qkv + first_head * (2 * HALF) + dim
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    if cos is not None:
        angle = row_offset(tl.load(positions + token), HALF) + dim
        of_cos = tl.load(cos + angle, mask=dim < HALF, other=0.0)
        of_sin = tl.load(sin + angle, mask=dim < HALF, other=0.0)
        first, second = _turned(first, second, of_cos, of_sin)
    return first, second


@triton.jit
def _rotate_and_store(
    qkv,
    cos,
    sin,
    positions,
    pool,
    slots,
    qkv_stride,
    layer,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    DIMS: tl.constexpr,
):
    token = tl.program_id(0)
    what = tl.program_id(1)
    row = qkv + row_offset(token, qkv_stride)
    dim = tl.arange(0, DIMS)[None, :]
    if what == 0:
        if cos is not None:
            head = tl.arange(0, HEADS)[:, None]
            first, second = _token_heads(row, token, head, head < NUM_HEADS, cos, sin, positions, HALF, DIMS)
            place = row + head * (2 * HALF) + dim
            inside = (head < NUM_HEADS) & (dim < HALF)
            tl.store(place, first.to(qkv.dtype.element_ty), mask=inside)
            tl.store(place + HALF, second.to(qkv.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            head = tl.arange(0, KV_HEADS)[:, None]
            is_head = head < NUM_KV_HEADS
            if what == 1:
                first, second = _token_heads(row, token, NUM_HEADS + head, is_head, cos, sin, positions, HALF, DIMS)
            else:
                first, second = _token_heads(
                    row, token, NUM_HEADS + NUM_KV_HEADS + head, is_head, None, None, None, HALF, DIMS
                )
            start = slot_offset(slot, layer, what - 1, NUM_LAYERS, BLOCK_SIZE, NUM_KV_HEADS * 2 * HALF)
            place = pool + start + head * (2 * HALF) + dim
            inside = is_head & (dim < HALF)
            tl.store(place, first.to(pool.dtype.element_ty), mask=inside)
            tl.store(place + HALF, second.to(pool.dtype.element_ty), mask=inside)


@triton.jit
def _grown_scale(old, largest, LARGEST: tl.constexpr, IS_FP8: tl.constexpr):
    needed = tl.div_rn(largest, LARGEST)
    if IS_FP8:
        bits = needed.to(tl.uint32, bitcast=True)
        needed = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    grown = tl.where(needed > old, needed, old)
    return tl.where((largest < float("inf")) & (old == old), grown, float("nan"))


@triton.jit
def _rescale(place, inside, old, new, LARGEST: tl.constexpr, IS_FP8: tl.constexpr):
    codes = tl.load(place, mask=inside, other=0)
    tl.store(place, scaled_codes(code_numbers(codes, IS_FP8) * old, new, LARGEST, IS_FP8), mask=inside)


@triton.jit
def _store_scaled(
    kv,
    cos,
    sin,
    positions,
    pool,
    scales,
    slots,
    kv_stride,
    layer,
    num_tokens,
    LARGEST: tl.constexpr,
    IS_FP8: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    DIMS: tl.constexpr,
):
    start = tl.program_id(0)
    part = tl.program_id(1) // NUM_KV_HEADS
    head = tl.program_id(1) % NUM_KV_HEADS
    slot = tl.load(slots + start)
    before = tl.load(slots + start - 1, mask=start > 0, other=-1)
    block = slot // BLOCK_SIZE
    if (slot >= 0) & ((before < 0) | (before // BLOCK_SIZE != block)):
        row = tl.arange(0, ROWS)[:, None]
        dim = tl.arange(0, DIMS)[None, :]
        token = start + row
        is_near = (row < BLOCK_SIZE) & (token < num_tokens)
        own_slot = tl.load(slots + token, mask=is_near, other=-1)
        is_own = is_near & (own_slot >= 0) & (own_slot // BLOCK_SIZE == block)
        inside = is_own & (dim < HALF)
        source = kv + row_offset(token, kv_stride) + tl.program_id(1) * (2 * HALF) + dim
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        if cos is not None:  # noqa: SIM102 - known when compiled, unlike the part
            if part == 0:
                angle = row_offset(tl.load(positions + token, mask=is_own, other=0), HALF) + dim
                of_cos = tl.load(cos + angle, mask=inside, other=0.0)
                of_sin = tl.load(sin + angle, mask=inside, other=0.0)
                first, second = _turned(first, second, of_cos, of_sin)
        scale_place = scales + scale_offset(block, layer, part, NUM_LAYERS, NUM_KV_HEADS) + head
        num_earlier = slot % BLOCK_SIZE
        old = tl.load(scale_place, mask=num_earlier > 0, other=0.0)
        largest = tl.maximum(largest_magnitude(first, inside), largest_magnitude(second, inside))
        new = _grown_scale(old, largest, LARGEST, IS_FP8)
        place = pool + slot_offset(own_slot, layer, part, NUM_LAYERS, BLOCK_SIZE, NUM_KV_HEADS * 2 * HALF)
        place += head * (2 * HALF) + dim
        if new != old:
            earlier = pool + slot_offset(
                block * BLOCK_SIZE + row, layer, part, NUM_LAYERS, BLOCK_SIZE, NUM_KV_HEADS * 2 * HALF
            )
            earlier += head * (2 * HALF) + dim
            is_earlier = (row < num_earlier) & (dim < HALF)
            _rescale(earlier, is_earlier, old, new, LARGEST, IS_FP8)
            _rescale(earlier + HALF, is_earlier, old, new, LARGEST, IS_FP8)
        tl.store(place, scaled_codes(first, new, LARGEST, IS_FP8), mask=inside)
        tl.store(place + HALF, scaled_codes(second, new, LARGEST, IS_FP8), mask=inside)
        tl.store(scale_place, new)
