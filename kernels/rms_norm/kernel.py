"""RMS norms in Triton: one row at a time, read once and written once.

`_norm_rows`: grid (rows). A program holds a whole row, and with a residual also writes the sum; the norm is that of
the sum as it is stored, so that a fused step equals the same step in two.
`_norm_heads`: grid (tokens, groups of HEADS heads); a program holds HEADS rows of head_dim and normalises in place.

Roofline: some 4 operations a number of 2 or 4 bytes. Bound by memory: 2 · rows · width · itemsize bytes, with the
residual twice that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..choice import next_power_of_two
from ..triton_parts import row_offset

_HEADS = 8


def norm_rows(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, out: torch.Tensor, eps: float
) -> None:
    """x, residual, out [rows, width], dense in the last dimension. `residual` becomes the sum."""
    rows, width = x.shape
    if not rows:
        return
    block = next_power_of_two(width)
    _norm_rows[(rows,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )


def norm_heads(qk: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, num_heads: int, eps: float) -> None:
    """qk [num_tokens, heads, head_dim], dense in the last dimension, in place."""
    num_tokens, heads, head_dim = qk.shape
    if not num_tokens:
        return
    _norm_heads[(num_tokens, triton.cdiv(heads, _HEADS))](
        qk,
        q_weight,
        k_weight,
        qk.stride(0),
        qk.stride(1),
        num_heads,
        heads,
        eps,
        WIDTH=head_dim,
        BLOCK=next_power_of_two(head_dim),
        HEADS=_HEADS,
    )


@triton.jit
def _norm_rows(
    x, residual, weight, out, x_stride, residual_stride, out_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(x + row_offset(row, x_stride) + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        place = residual + row_offset(row, residual_stride) + column
        total = (values + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, total, mask=inside)
        values = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    normed = values * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row_offset(row, out_stride) + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_heads(
    qk,
    q_weight,
    k_weight,
    token_stride,
    head_stride,
    num_heads,
    all_heads,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < all_heads) & (column < WIDTH)
    place = qk + row_offset(tl.program_id(0), token_stride) + head * head_stride + column
    values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / WIDTH + eps)
    of_q = tl.load(q_weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = values * scale[:, None] * tl.where(head < num_heads, of_q, of_k)
    tl.store(place, normed.to(qk.dtype.element_ty), mask=inside)
