"""The truth for products with grouped weights: rows rounded to 8 bits as the kernel rounds them, then plain float32."""

from __future__ import annotations

import torch

from .grouped import GROUP


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, ins] float32 → whole numbers [rows, ins / 32, 32] from -127 to 127, and the scale of each group."""
    groups = x.view(x.shape[0], -1, GROUP)
    most = groups.abs().amax(dim=-1)
    inverse = torch.where(most > 0, 127 / most, 0.0)
    return (groups * inverse[..., None]).round_(), most / 127


def quant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `op.QuantLinear`, with the weight expanded to float32 [outs, ins]."""
    q, scale = quantize_rows(x)
    return torch.nn.functional.linear((q * scale[..., None]).view(x.shape), weight, bias)
