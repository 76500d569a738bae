"""SiLU(gate) · up in Triton.

Grid (rows, tiles of BLOCK columns). A program reads BLOCK numbers of the gate and of what it gates, and writes BLOCK.
Roofline: 6 operations for 3 numbers moved. Bound by memory: 3 · rows · inner · itemsize bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..choice import next_power_of_two
from ..triton_parts import row_offset


def launch(x: torch.Tensor, out: torch.Tensor) -> None:
    """x [rows, 2 · inner], out [rows, inner], both dense in the last dimension."""
    rows, inner = out.shape
    if not rows:
        return
    block = min(2048, next_power_of_two(inner))
    _silu_mul[(rows, triton.cdiv(inner, block))](x, out, x.stride(0), out.stride(0), inner, BLOCK=block)


@triton.jit
def _silu_mul(x, out, x_stride, out_stride, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    place = x + row_offset(row, x_stride) + column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + inner, mask=inside, other=0.0).to(tl.float32)
    decay = tl.exp(-tl.abs(gate))  # never above 1, so nothing overflows
    sigmoid = tl.where(gate >= 0, 1.0, decay) / (1.0 + decay)
    tl.store(out + row_offset(row, out_stride) + column, (gate * sigmoid * up).to(out.dtype.element_ty), mask=inside)
