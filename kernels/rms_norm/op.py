"""Root-mean-square norms: of rows, of rows after a residual is added, and of each head of queries and keys.

Sums run in float32 whatever the types; weights may be of another float type than what they scale.
"""

from __future__ import annotations

import torch

from ...core.errors import InternalError
from ..choice import check_same_device, runs_triton
from . import reference

MAX_WIDTH = 65536  # a program of the Triton kernel holds a row


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm of x [rows, width] in its type. Raises InternalError. Reference: `reference.rms_norm`."""
    _check_rows(x, weight)
    if not runs_triton(x):
        return reference.rms_norm(x, weight, eps)
    from .kernel import norm_rows

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_rows(x, None, weight, out, eps)
    return out


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x to `residual`, in place, and return the norm of the sum; both [rows, width] of one type, rows strided.

    The sum is rounded to that type once, and the norm is that of the rounded sum. `x` and `residual` do not overlap.
    Raises InternalError. Reference: `reference.add_rms_norm`.
    """
    _check_rows(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(-1) != 1:
        raise InternalError(f"the residual is {_described(residual)}, x is {_described(x)}")
    check_same_device(x=x, residual=residual)
    if not runs_triton(x):
        return reference.add_rms_norm(x, residual, weight, eps)
    from .kernel import norm_rows

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_rows(x, residual, weight, out, eps)
    return out


def qk_norm(qk: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, num_heads: int, eps: float) -> None:
    """Normalise each head of qk [num_tokens, num_heads + num_kv_heads, head_dim] in place, the queries' heads first.

    q_weight, k_weight [head_dim], contiguous; tokens and heads may be strided. Raises InternalError. Reference:
    `reference.qk_norm`.
    """
    _check_weight(q_weight, qk.shape[-1])
    _check_weight(k_weight, qk.shape[-1])
    if qk.dim() != 3 or not qk.is_floating_point() or qk.stride(2) != 1 or not 0 <= num_heads <= qk.shape[1]:
        raise InternalError(f"queries and keys are {_described(qk)}, of which {num_heads} heads of queries")
    check_same_device(qk=qk, q_weight=q_weight, k_weight=k_weight)
    if not runs_triton(qk):
        reference.qk_norm(qk, q_weight, k_weight, num_heads, eps)
        return
    from .kernel import norm_heads

    norm_heads(qk, q_weight, k_weight, num_heads, eps)


def _check_rows(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point() or x.stride(1) != 1 or not 0 < x.shape[1] <= MAX_WIDTH:
        raise InternalError(f"x is {_described(x)}, not [rows, width] of floats in dense rows of at most {MAX_WIDTH}")
    _check_weight(weight, x.shape[1])
    check_same_device(x=x, weight=weight)


def _check_weight(weight: torch.Tensor, width: int) -> None:
    if weight.shape != (width,) or not weight.is_floating_point() or not weight.is_contiguous():
        raise InternalError(f"the weight is {_described(weight)}, not [{width}] of floats")


def _described(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} at strides {list(tensor.stride())}"
