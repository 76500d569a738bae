"""Products with quantised weights in plain torch: the weight is expanded to float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .weights import QuantWeight, dequantised, rounded_rows


def quant_matmul(x: torch.Tensor, weight: QuantWeight) -> torch.Tensor:
    """As `op.quant_matmul`."""
    rows = x.float()
    if weight.kind == "w8a8":
        codes, scales = rounded_rows(x)
        rows = codes.float() * scales[:, None]
    return F.linear(rows, dequantised(weight)).to(x.dtype)
