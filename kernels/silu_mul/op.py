"""The gated activation between the two products of a feed-forward layer."""

from __future__ import annotations

import torch

from ...core.errors import InternalError
from ..choice import runs_triton
from . import reference


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) · up, [rows, inner], of x [rows, 2 · inner], gates in the first half; rows may be strided.

    Computed in float32 and rounded once to the type of `x`. Raises InternalError. Reference: `reference.silu_mul`.
    """
    if x.dim() != 2 or not x.is_floating_point() or x.shape[1] % 2 or not x.shape[1] or x.stride(1) != 1:
        described = f"{list(x.shape)} {x.dtype} at strides {list(x.stride())}"
        raise InternalError(f"x is {described}, not [rows, 2 · inner] of floats in dense rows")
    if not runs_triton(x):
        return reference.silu_mul(x)
    from .kernel import launch

    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype, device=x.device)
    launch(x, out)
    return out
