"""Low-rank adapters (Hu et al., ICLR 2022) one row at a time, in float32."""

from __future__ import annotations

import torch

from .weights import Adapters


def add_lora(y: torch.Tensor, x: torch.Tensor, adapters: Adapters, chosen: torch.Tensor) -> None:
    """As `op.add_lora`."""
    for row, adapter in enumerate(chosen.tolist()):
        if adapter >= 0:
            inner = adapters.down[adapter].float() @ x[row].float()
            y[row] = (y[row].float() + adapters.scales[adapter] * (adapters.up[adapter].float() @ inner)).to(y.dtype)
