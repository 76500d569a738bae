"""A projection whose weight lies in the layout that this machine multiplies fastest.

On x86 oneDNN repacks the weight into tiles once, at load. A decode step reads each weight for a handful of rows, and
from a packed weight it does so at about twice the speed of `F.linear`, which finds the plain layout anew in each
call. One packing serves every number of rows. Where oneDNN cannot pack (another CPU, another device), the plain
weight and `F.linear` are used.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

# The rows that oneDNN is told to expect. Packed for 128 rows, products with 1 to 1024 rows are within a few per cent
# of the
# best packing for each; packed for 1 row, those with 32 rows take twice as long.
_EXPECTED_ROWS = 128


class Linear:
    """y = x · weightᵀ + bias for x [rows, in], contiguous. Keeps the weight [out, in] packed, not as it was given."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.bias = bias
        self.num_weights, self.num_bytes = weight.numel(), weight.nbytes
        self.is_packed = weight.device.type == "cpu" and can_pack(weight.dtype)
        self.weight = _pack(weight) if self.is_packed else weight.contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """y + residual [rows, out], rounded once."""
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias).add_(residual)
        total: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return total

    def dense(self) -> torch.Tensor:
        """The weight as it was given: a copy where it is packed."""
        weight: torch.Tensor = self.weight.to_dense() if self.is_packed else self.weight
        return weight


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN here packs weights of `dtype` and computes with them; asked by doing it once."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    weight = torch.eye(64, dtype=dtype)
    try:
        packed = _pack(weight)
        product = torch.ops.mkldnn._linear_pointwise(weight, packed, None, "none", [], "")
        total = torch.ops.mkldnn._linear_pointwise.binary(weight, weight, packed, None, "add")
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(product, weight) and torch.equal(total, weight + weight)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
    return packed
