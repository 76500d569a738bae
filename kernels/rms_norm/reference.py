"""Root-mean-square norms (Zhang & Sennrich, NeurIPS 2019) in plain torch, in float32."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., width] over its last dimension, weight [width], in the type of `x`."""
    values = x.float()
    mean_square = values.square().mean(dim=-1, keepdim=True)
    return (values / (mean_square + eps).sqrt() * weight.float()).to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `op.add_rms_norm`."""
    residual.copy_(x.float() + residual.float())
    return rms_norm(residual, weight, eps)


def qk_norm(qk: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, num_heads: int, eps: float) -> None:
    """As `op.qk_norm`."""
    for head in range(qk.shape[1]):
        qk[:, head] = rms_norm(qk[:, head], q_weight if head < num_heads else k_weight, eps)
