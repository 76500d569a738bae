"""The adapters that a worker holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Adapters:
    """Low-rank adapters of one linear layer, contiguous; one with a smaller inner size is padded with zeros.

    down [num_adapters, inner, ins], up [num_adapters, outs, inner] of one float type, scales [num_adapters] float32.
    """

    down: torch.Tensor
    up: torch.Tensor
    scales: torch.Tensor
