"""A projection with grouped weights of 4 or 8 bits, whose input rows are rounded to 8 bits group by group.

The kernel multiplies whole numbers, exactly, and adds groups in order: a row's result is the same whatever rows stand
beside it. Where there is no native kernel, the expanded weight serves with the same rounding.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import torch

from ...core.errors import InternalError
from ..native.library import ADDRESS, INT32, INT64, Function, function
from . import reference
from .grouped import GROUP, GroupedWeight, PackedWeight, expand, pack, unpack


class Matrix(ctypes.Structure):
    """The twin of `Matrix` in cpu.h."""

    _fields_ = [("outs", INT64), ("ins", INT64), ("bits", INT64), ("data", ADDRESS), ("bias", ADDRESS)]


class QuantLinear:
    """y = x · weightᵀ + bias for x [rows, ins] float32, contiguous → [rows, outs] float32.

    `is_native`: the kernel computes; else the float32 twin. Both keep what they were made of alive.
    """

    def __init__(self, weight: GroupedWeight, bias: torch.Tensor | None = None) -> None:
        self.outs, self.ins = weight.shape
        self.is_native = is_native()
        self.packed = pack(weight)
        self.num_weights, self.num_bytes = self.outs * self.ins, self.packed.data.nbytes
        self.bias = None if bias is None else _padded(bias, self.packed.padded_outs)
        self._expanded = None if self.is_native else expand(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2 or x.shape[1] != self.ins or x.dtype != torch.float32 or not x.is_contiguous():
            raise InternalError(f"x is {list(x.shape)} {x.dtype}, not [rows, {self.ins}] float32, contiguous")
        if self._expanded is None:
            return _multiply(self, x)
        bias = None if self.bias is None else self.bias[: self.outs]
        return reference.quant_linear(x, self._expanded, bias)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """y + residual [rows, outs]."""
        return self(x) + residual

    def matrix(self) -> Matrix:
        """For kernels that take the packed weight; valid while this object lives."""
        bias = None if self.bias is None else self.bias.data_ptr()
        packed = self.packed
        return Matrix(packed.padded_outs, packed.ins, packed.bits, packed.data.ctypes.data, bias)


class QuantEmbedding:
    """Rows of a grouped weight by number, float32."""

    def __init__(self, linear: QuantLinear) -> None:
        self.linear, self._packed = linear, linear.packed

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def index_select(self, _: int, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens, ins], as of a tensor [outs, ins]."""
        blocks = token_ids.numpy() // 16
        some = PackedWeight(self._packed.data[blocks], len(blocks) * 16, self._packed.ins, self._packed.bits)
        rows = np.arange(len(blocks)) * 16 + token_ids.numpy() % 16
        return expand(unpack(some).rows(rows))


@cache
def _native() -> Function | None:
    return function("quant_linear", [ADDRESS, ADDRESS, INT64, ADDRESS, ADDRESS, ADDRESS, ADDRESS, INT32])


def is_native() -> bool:
    return _native() is not None


def _multiply(linear: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    native = _native()
    assert native is not None
    rows = x.shape[0]
    out = torch.empty(rows, linear.packed.padded_outs)
    q = torch.empty(rows, linear.ins, dtype=torch.int8)
    scale, shift = torch.empty(2, rows, linear.ins // GROUP)
    matrix = linear.matrix()
    native(
        ctypes.addressof(matrix),
        x.data_ptr(),
        rows,
        q.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out[:, : linear.outs]


def _padded(bias: torch.Tensor, outs: int) -> torch.Tensor:
    full = torch.zeros(outs)
    full[: len(bias)] = bias
    return full
