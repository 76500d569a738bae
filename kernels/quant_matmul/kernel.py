"""Products with quantised weights in Triton: y = x · Wᵀ.

`_product`: grid (tiles of outputs, tiles of rows). A program expands a tile of the weight in registers to the type of x
and multiplies it on the tensor cores, with sums in float32; w8a8 multiplies the codes and sums in int32. Tiles of
outputs come first, so that programs that run side by side read other weights and the same few rows.
`_round_rows`: grid (rows), the int8 codes and the scale of each row of x, for w8a8.

Roofline: with r rows, 2 · r operations for each weight of 0.5 to 1 byte. Up to some hundred rows the weight's bytes are
the limit, beyond that the tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..choice import next_power_of_two
from ..triton_parts import e4m3_number, product, row_offset, whole
from .weights import QuantWeight


def launch(x: torch.Tensor, weight: QuantWeight, out: torch.Tensor) -> None:
    """x [rows, ins] and out [rows, outs], dense in the last dimension."""
    rows, ins = x.shape
    if not rows:
        return
    dtype, row_scales = x.dtype, None
    if weight.kind == "w8a8":
        x, row_scales = _rounded(x)
    block_rows = min(64, max(16, next_power_of_two(rows)))
    block_outs = 64
    _product[(triton.cdiv(weight.outs, block_outs), triton.cdiv(rows, block_rows))](
        x,
        weight.data,
        weight.scales,
        weight.minima,
        row_scales,
        out,
        rows,
        weight.outs,
        x.stride(0),
        weight.data.stride(0),
        out.stride(0),
        KIND=weight.kind,
        INS=ins,
        GROUP=weight.group_size,
        BLOCK_ROWS=block_rows,
        BLOCK_OUTS=block_outs,
        BLOCK_INS=_tile(weight),
        PRECISION="ieee" if dtype == torch.float32 else "tf32",
    )


def _tile(weight: QuantWeight) -> int:
    """Columns of a tile: within one group, so that a tile has one scale an output."""
    if weight.kind != "int4":
        return 64
    return max(width for width in (32, 64, 128) if weight.group_size % width == 0)


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    block = next_power_of_two(x.shape[1])
    _round_rows[(x.shape[0],)](x, codes, scales, x.stride(0), WIDTH=x.shape[1], BLOCK=block, num_warps=8)
    return codes, scales


@triton.jit
def _round_rows(x, codes, scales, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(x + row_offset(row, stride) + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(values), axis=0), 127.0)
    quotients = tl.div_rn(values, tl.where(scale > 0, scale, 1.0))
    rounded = whole(tl.minimum(tl.maximum(quotients, -127.0), 127.0)).to(tl.int8)
    tl.store(codes + row_offset(row, WIDTH) + column, rounded, mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _int4_tile(data, scales, minima, start, is_out, INS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """[outs, WIDTH] float32. `data`, `scales` and `minima` point to the rows of the outputs, [outs, 1]."""
    byte = start // 2 + tl.arange(0, WIDTH // 2)[None, :]
    packed = tl.load(data + byte, mask=is_out & (byte < INS // 2), other=0)
    codes = tl.join(packed & 15, packed >> 4).reshape(packed.shape[0], WIDTH).to(tl.float32)
    group = start // GROUP
    return codes * tl.load(scales + group, mask=is_out, other=0.0) + tl.load(minima + group, mask=is_out, other=0.0)


@triton.jit
def _product(
    x,
    data,
    scales,
    minima,
    row_scales,
    out,
    rows,
    outs,
    x_stride,
    data_stride,
    out_stride,
    KIND: tl.constexpr,
    INS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_INS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) * BLOCK_OUTS + tl.arange(0, BLOCK_OUTS)
    is_row = (row < rows)[:, None]
    is_out = (column < outs)[:, None]
    x_rows = x + row_offset(row, x_stride)[:, None]
    data_rows = data + row_offset(column, data_stride)[:, None]
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTS], tl.int32 if KIND == "w8a8" else tl.float32)
    for start in range(0, INS, BLOCK_INS):
        inner = start + tl.arange(0, BLOCK_INS)[None, :]
        tile = tl.load(x_rows + inner, mask=is_row & (inner < INS), other=0)
        if KIND == "int4":
            groups = row_offset(column, INS // GROUP)[:, None]
            weights = _int4_tile(data_rows, scales + groups, minima + groups, start, is_out, INS, GROUP, BLOCK_INS)
        else:
            weights = tl.load(data_rows + inner, mask=is_out & (inner < INS), other=0)
            if KIND == "fp8":
                weights = e4m3_number(weights)
        if KIND == "w8a8":
            total += tl.dot(tile, tl.trans(weights), out_dtype=tl.int32)
        else:
            total += product(tile, tl.trans(weights.to(tl.float32).to(tile.dtype)), PRECISION)
    result = total.to(tl.float32)
    if KIND != "int4":
        result *= tl.load(scales + column, mask=column < outs, other=0.0)[None, :]
    if KIND == "w8a8":
        result *= tl.load(row_scales + row, mask=row < rows, other=0.0)[:, None]
    place = out + row_offset(row, out_stride)[:, None] + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=is_row & (column < outs)[None, :])
