"""Scattered blocks into contiguous wire blocks and back, in Triton.

Grid (blocks, layers, 2 · KV heads). A program moves one head of K or of V of one layer of one block, a tile
[block_size, head_dim], and for an 8-bit format finds its scale on the way. Numbers are handled as bits, so that equal
types are copied and all others come out the same on every device.

Roofline: bound by memory; what is read plus what is written, once each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..choice import next_power_of_two
from ..triton_parts import code_numbers, largest_magnitude, row_offset, scaled_codes
from ..wire_format.formats import is_scaled, item_bytes

_BITS = {2: torch.int16, 4: torch.int32}


def launch_pack(
    kv_pool: torch.Tensor, block_ids: torch.Tensor, first_layer: int, out: torch.Tensor, wire_dtype: str
) -> None:
    """As `op.pack`, checked."""
    if out.shape[0] and out.shape[1]:
        _launch(_pack, kv_pool, block_ids, first_layer, out, wire_dtype)


def launch_unpack(
    data: torch.Tensor, kv_pool: torch.Tensor, block_ids: torch.Tensor, first_layer: int, wire_dtype: str
) -> None:
    """As `op.unpack`, checked."""
    if data.shape[0] and data.shape[1]:
        _launch(_unpack, kv_pool, block_ids, first_layer, data, wire_dtype)


def _launch(kernel, kv_pool, block_ids, first_layer, wire, wire_dtype):
    _, num_layers, _, block_size, num_kv_heads, head_dim = kv_pool.shape
    item = item_bytes(wire_dtype)
    kernel[(wire.shape[0], wire.shape[1], 2 * num_kv_heads)](
        kv_pool.view(_BITS[kv_pool.itemsize]),
        block_ids,
        wire,
        first_layer,
        wire.stride(0),
        wire.stride(1),
        CACHE=str(kv_pool.dtype).removeprefix("torch."),
        WIRE=wire_dtype,
        IS_SCALED=is_scaled(wire_dtype),
        LARGEST=448.0 if wire_dtype == "fp8_e4m3" else 127.0,
        ITEM=item,
        IS_ALIGNED=all(place % item == 0 for place in (wire.data_ptr(), wire.stride(0), wire.stride(1))),
        NUM_LAYERS=num_layers,
        BLOCK_SIZE=block_size,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROWS=next_power_of_two(block_size),
        DIMS=next_power_of_two(head_dim),
    )


@triton.jit
def part_offset(block, layer, part, NUM_LAYERS: tl.constexpr, PART_WIDTH: tl.constexpr):
    """As `reference.part_offset`; PART_WIDTH is block_size · num_kv_heads · head_dim."""
    return ((block.to(tl.int64) * NUM_LAYERS + layer) * 2 + part) * PART_WIDTH


@triton.jit
def _float_of(bits, KIND: tl.constexpr):
    """The bits of a float type → float32, exactly."""
    if KIND == "float32":
        number = bits.to(tl.float32, bitcast=True)
    elif KIND == "bfloat16":
        number = (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        number = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def _bits_of(number, KIND: tl.constexpr):
    """float32 → the bits of the nearest number of a float type, its largest for what is beyond; int16 or int32."""
    if KIND == "float32":
        bits = _within(number, 3.4028234663852886e38).to(tl.int32, bitcast=True)
    elif KIND == "bfloat16":
        wide = _within(number, 3.3895313892515355e38).to(tl.uint32, bitcast=True)
        rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
        rounded = tl.where(number == number, rounded, 0x7FC0)
        bits = rounded.to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        bits = _within(number, 65504.0).to(tl.float16).to(tl.int16, bitcast=True)
    return bits


@triton.jit
def _within(number, LARGEST: tl.constexpr):
    """Clamped to ±LARGEST; a NaN stays one."""
    return tl.where(number == number, tl.minimum(tl.maximum(number, -LARGEST), LARGEST), number)


@triton.jit
def _store_bits(start, item, bits, inside, ITEM: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """Write items of ITEM bytes at `start`, a pointer to bytes: at once where it is aligned, else byte by byte."""
    if ITEM == 1:
        tl.store(start + item, bits, mask=inside)
    elif IS_ALIGNED:
        kind: tl.constexpr = tl.pointer_type(bits.dtype)
        tl.store(start.to(kind, bitcast=True) + item, bits, mask=inside)
    else:
        for byte in tl.static_range(ITEM):
            tl.store(start + item * ITEM + byte, ((bits >> (8 * byte)) & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def _load_bits(start, item, inside, KIND: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """Items of a float type as int16 or int32."""
    word: tl.constexpr = tl.int32 if KIND == "float32" else tl.int16
    if IS_ALIGNED:
        kind: tl.constexpr = tl.pointer_type(word)
        bits = tl.load(start.to(kind, bitcast=True) + item, mask=inside, other=0)
    else:
        size: tl.constexpr = word.primitive_bitwidth // 8
        bits = tl.zeros(inside.shape, word)
        for byte in tl.static_range(size):
            bits |= tl.load(start + item * size + byte, mask=inside, other=0).to(word) << (8 * byte)
    return bits


@triton.jit
def _pack(
    pool,
    block_ids,
    wire,
    first_layer,
    block_stride,
    layer_stride,
    CACHE: tl.constexpr,
    WIRE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
    ITEM: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    part = tl.program_id(2) // NUM_KV_HEADS
    head = tl.program_id(2) % NUM_KV_HEADS
    slot = tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    inside = (slot < BLOCK_SIZE) & (dim < HEAD_DIM)
    width: tl.constexpr = BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM
    item = (slot * NUM_KV_HEADS + head) * HEAD_DIM + dim
    block = tl.load(block_ids + tl.program_id(0))
    source = pool + part_offset(block, first_layer + tl.program_id(1), part, NUM_LAYERS, width)
    bits = tl.load(source + item, mask=inside, other=0)
    start = wire + row_offset(tl.program_id(0), block_stride) + row_offset(tl.program_id(1), layer_stride)
    if IS_SCALED:
        values = _float_of(bits, CACHE)
        largest = largest_magnitude(values, inside)
        scale = tl.where(largest < float("inf"), tl.div_rn(largest, LARGEST), float("nan"))
        tl.store(start + part * width + item, scaled_codes(values, scale, LARGEST, WIRE == "fp8_e4m3"), mask=inside)
        scale_bits = scale.to(tl.uint32, bitcast=True)
        place = start + 2 * width + tl.program_id(2) * 4
        for byte in tl.static_range(4):
            tl.store(place + byte, ((scale_bits >> (8 * byte)) & 0xFF).to(tl.uint8))
    elif CACHE == WIRE:
        _store_bits(start, part * width + item, bits, inside, ITEM, IS_ALIGNED)
    else:
        _store_bits(start, part * width + item, _bits_of(_float_of(bits, CACHE), WIRE), inside, ITEM, IS_ALIGNED)


@triton.jit
def _unpack(
    pool,
    block_ids,
    wire,
    first_layer,
    block_stride,
    layer_stride,
    CACHE: tl.constexpr,
    WIRE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
    ITEM: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    part = tl.program_id(2) // NUM_KV_HEADS
    head = tl.program_id(2) % NUM_KV_HEADS
    slot = tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    inside = (slot < BLOCK_SIZE) & (dim < HEAD_DIM)
    width: tl.constexpr = BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM
    item = (slot * NUM_KV_HEADS + head) * HEAD_DIM + dim
    start = wire + row_offset(tl.program_id(0), block_stride) + row_offset(tl.program_id(1), layer_stride)
    if IS_SCALED:
        codes = tl.load(start + part * width + item, mask=inside, other=0)
        place = start + 2 * width + tl.program_id(2) * 4
        scale_bits = tl.load(place).to(tl.uint32)
        for byte in tl.static_range(1, 4):
            scale_bits |= tl.load(place + byte).to(tl.uint32) << (8 * byte)
        numbers = code_numbers(codes, WIRE == "fp8_e4m3") * scale_bits.to(tl.float32, bitcast=True)
        bits = _bits_of(numbers, CACHE)
    elif CACHE == WIRE:
        bits = _load_bits(start, part * width + item, inside, WIRE, IS_ALIGNED)
    else:
        bits = _bits_of(_float_of(_load_bits(start, part * width + item, inside, WIRE, IS_ALIGNED), WIRE), CACHE)
    block = tl.load(block_ids + tl.program_id(0))
    target = pool + part_offset(block, first_layer + tl.program_id(1), part, NUM_LAYERS, width)
    tl.store(target + item, bits, mask=inside)
