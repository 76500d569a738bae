"""What several Triton kernels are made of. Only `kernel.py` files import it: it loads Triton.

Conversions are written out in integers where a result must have the same bits on every device: a GPU without FP8
units, one with them, and Triton's interpreter round in three different ways.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

_IS_INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 · 2^23: float32 numbers of this size are whole


@triton.jit
def row_offset(row, stride):
    """Elements from the start of a matrix to its row, in int64: a matrix holds more than 2^31 elements."""
    return row.to(tl.int64) * stride


@triton.jit
def whole(x):
    """float32 below 2^22 in magnitude → the nearest whole number, the even one of two."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def e4m3_code(x):
    """float32 within ±448 → the code of the nearest FP8-E4M3 number, the even code of two; uint8. No NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Rounding at bit 20 may carry into the exponent, which is what rounding up to the next power of two is.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    below = whole(tl.minimum(tl.abs(x), 0.015625) * 512.0).to(tl.uint32)  # steps of 2^-9 below 2^-6
    code = tl.where(magnitude < 0x3C800000, below, normal)
    return (code | (bits >> 31 << 7)).to(tl.uint8)


@triton.jit
def e4m3_number(code):
    """uint8 → float32, exactly; 0x7F and 0xFF are NaN."""
    word = code.to(tl.uint16)
    half = ((word & 0x80) << 8) | ((word & 0x7F) << 7)  # as float16: the same number times 2^-8
    number = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((word & 0x7F) == 0x7F, float("nan"), number)


@triton.jit
def int8_number(code):
    """The bits of an int8, given as uint8 → float32."""
    return code.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def code_numbers(codes, IS_FP8: tl.constexpr):
    """uint8 codes of either 8-bit format → float32."""
    return e4m3_number(codes) if IS_FP8 else int8_number(codes)


@triton.jit
def scaled_codes(values, scale, LARGEST: tl.constexpr, IS_FP8: tl.constexpr):
    """float32 → uint8 codes in units of `scale`; zeros where it is NaN."""
    quotients = tl.div_rn(values, tl.where(scale > 0, scale, 1.0))
    quotients = tl.where(scale == scale, tl.minimum(tl.maximum(quotients, -LARGEST), LARGEST), 0.0)
    return e4m3_code(quotients) if IS_FP8 else whole(quotients).to(tl.int8).to(tl.uint8, bitcast=True)


@triton.jit
def largest_magnitude(values, inside):
    """The largest of |values|, a matrix; infinite where one is NaN, which a maximum would pass over."""
    magnitude = tl.abs(values)
    magnitude = tl.where(magnitude == magnitude, magnitude, float("inf"))
    return tl.max(tl.max(tl.where(inside, magnitude, 0.0), axis=1), axis=0)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a · b with sums in float32. To the interpreter the bits of a bfloat16 are a whole number, so it gets float32."""
    if _IS_INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)
