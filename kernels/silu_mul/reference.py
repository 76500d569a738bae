"""The gated activation of a SwiGLU feed-forward (Shazeer, 2020) in plain torch, in float32."""

from __future__ import annotations

import torch


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """As `op.silu_mul`."""
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)
