"""Products with many low-rank adapters in one batch, in Triton.

`_shrink`: grid (tiles of rows); x · downᵀ into float32 [rows, INNER]. `_expand`: grid (tiles of rows, tiles of
outputs); y += scale · (inner · upᵀ). A program goes over the adapters that its rows name, in ascending order,
multiplies all its rows with each, and keeps of the result the rows that named it: an adapter with a NaN touches no row
of another. The rows of a sequence are neighbours, so a tile of a prefill has one adapter and runs at the speed of a
plain product; a tile of a decode step has up to as many as rows. Nothing is sorted and no plan is made on the host. As
in SGMV (Chen et al., Punica, MLSys 2024), with the segments found on the device.

Roofline: bound by memory; each adapter's weights once for every tile of rows that names it, and x, y once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..choice import next_power_of_two
from ..triton_parts import product, row_offset
from .weights import Adapters

_BLOCK_ROWS = 16
_NONE: tl.constexpr = tl.constexpr(2147483647)


def launch(y: torch.Tensor, x: torch.Tensor, adapters: Adapters, chosen: torch.Tensor) -> None:
    """As `op.add_lora`, checked."""
    rows, ins = x.shape
    down, up, scales = adapters.down, adapters.up, adapters.scales
    if not rows or not down.shape[0]:
        return
    inner = max(16, next_power_of_two(down.shape[1]))
    shrunk = torch.empty(rows, inner, dtype=torch.float32, device=x.device)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    num_tiles = triton.cdiv(rows, _BLOCK_ROWS)
    sizes = {"OWN_INNER": down.shape[1], "INNER": inner, "BLOCK_ROWS": _BLOCK_ROWS, "PRECISION": precision}
    _shrink[(num_tiles,)](x, down, chosen, shrunk, rows, x.stride(0), INS=ins, BLOCK_INS=64, **sizes)
    _expand[(num_tiles, triton.cdiv(y.shape[1], 64))](
        y, shrunk, up, scales, chosen, rows, y.shape[1], y.stride(0), BLOCK_OUTS=64, **sizes
    )


@triton.jit
def weight_offset(adapter, row, rows, width):
    """Elements from the start of [adapters, rows, width] to a row of one adapter, in int64."""
    return (adapter.to(tl.int64) * rows + row) * width


@triton.jit
def _next_adapter(own, last):
    """The lowest of the rows' adapters above `last`; _NONE behind the last one."""
    return tl.min(tl.where(own > last, own, _NONE), axis=0)


@triton.jit
def _shrink(
    x,
    down,
    chosen,
    shrunk,
    rows,
    x_stride,
    INS: tl.constexpr,
    BLOCK_INS: tl.constexpr,
    OWN_INNER: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    own = tl.load(chosen + row, mask=row < rows, other=-1)
    inner = tl.arange(0, INNER)
    total = tl.zeros([BLOCK_ROWS, INNER], tl.float32)
    adapter = _next_adapter(own, -1)
    while adapter != _NONE:
        weights = down + weight_offset(adapter, inner, OWN_INNER, INS)[:, None]
        part = tl.zeros([BLOCK_ROWS, INNER], tl.float32)
        for start in range(0, INS, BLOCK_INS):
            column = start + tl.arange(0, BLOCK_INS)[None, :]
            place = x + row_offset(row, x_stride)[:, None] + column
            tile = tl.load(place, mask=(row < rows)[:, None] & (column < INS), other=0.0)
            weight = tl.load(weights + column, mask=(inner < OWN_INNER)[:, None] & (column < INS), other=0.0)
            part += product(tile, tl.trans(weight), PRECISION)
        total = tl.where((own == adapter)[:, None], part, total)
        adapter = _next_adapter(own, adapter)
    target = shrunk + row_offset(row, INNER)[:, None] + inner[None, :]
    tl.store(target, total, mask=(row < rows)[:, None] & (inner >= 0)[None, :])


@triton.jit
def _expand(
    y,
    shrunk,
    up,
    scales,
    chosen,
    rows,
    outs,
    y_stride,
    BLOCK_OUTS: tl.constexpr,
    OWN_INNER: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUTS + tl.arange(0, BLOCK_OUTS)
    own = tl.load(chosen + row, mask=row < rows, other=-1)
    inner = tl.arange(0, INNER)[None, :]
    # The inner numbers stay float32, as the reference keeps them; there are few of them.
    tile = tl.load(
        shrunk + row_offset(row, INNER)[:, None] + inner, mask=(row < rows)[:, None] & (inner >= 0), other=0.0
    )
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTS], tl.float32)
    adapter = _next_adapter(own, -1)
    while adapter != _NONE:
        weights = up + weight_offset(adapter, column, outs, OWN_INNER)[:, None] + inner
        weight = tl.load(weights, mask=(column < outs)[:, None] & (inner < OWN_INNER), other=0.0)
        part = tl.load(scales + adapter) * product(tile, tl.trans(weight.to(tl.float32)), PRECISION)
        total = tl.where((own == adapter)[:, None], part, total)
        adapter = _next_adapter(own, adapter)
    place = y + row_offset(row, y_stride)[:, None] + column[None, :]
    is_changed = (own >= 0)[:, None] & (column < outs)[None, :]
    before = tl.load(place, mask=is_changed, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(y.dtype.element_ty), mask=is_changed)
