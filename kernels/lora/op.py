"""Low-rank adapters of many requests in one batch: each row has its own, or none."""

from __future__ import annotations

import torch

from ...core.errors import InternalError
from ..choice import check_same_device, runs_triton
from . import reference
from .weights import Adapters

MAX_INNER = 256


def add_lora(y: torch.Tensor, x: torch.Tensor, adapters: Adapters, chosen: torch.Tensor) -> None:
    """y += scale · (x · downᵀ) · upᵀ, in place, with the adapter that each row names.

    y [rows, outs] and x [rows, ins] of the adapters' type, rows strided. chosen [rows] int32, below num_adapters; -1
    leaves the row of y as it is. Sums are float32, and y is rounded once. Raises InternalError. Reference:
    `reference.add_lora`.
    """
    _check_rows(y, x, chosen)
    _check_adapters(y, x, adapters)
    if not runs_triton(x):
        reference.add_lora(y, x, adapters, chosen)
        return
    from .kernel import launch

    launch(y, x, adapters, chosen)


def _check_rows(y: torch.Tensor, x: torch.Tensor, chosen: torch.Tensor) -> None:
    for name, rows in (("x", x), ("y", y)):
        if rows.dim() != 2 or not rows.is_floating_point() or rows.stride(1) != 1 or not rows.shape[1]:
            raise InternalError(f"{name} is {list(rows.shape)} {rows.dtype}, not dense rows of floats")
    if y.shape[0] != x.shape[0] or y.dtype != x.dtype:
        raise InternalError(f"y is {list(y.shape)} {y.dtype}, x is {list(x.shape)} {x.dtype}")
    if chosen.shape != x.shape[:1] or chosen.dtype != torch.int32 or not chosen.is_contiguous():
        raise InternalError(f"chosen is {list(chosen.shape)} {chosen.dtype}, not [{x.shape[0]}] int32")
    check_same_device(x=x, chosen=chosen)


def _check_adapters(y: torch.Tensor, x: torch.Tensor, adapters: Adapters) -> None:
    down, up, scales = adapters.down, adapters.up, adapters.scales
    check_same_device(y=y, x=x, down=down, up=up, scales=scales)
    if down.dim() != 3 or down.shape[2] != x.shape[1] or not 0 < down.shape[1] <= MAX_INNER:
        raise InternalError(f"down is {list(down.shape)}, not [adapters, inner up to {MAX_INNER}, {x.shape[1]}]")
    expected = (down.shape[0], y.shape[1], down.shape[1])
    if up.shape != expected or (up.dtype, down.dtype) != (x.dtype, x.dtype):
        raise InternalError(f"up is {list(up.shape)} {up.dtype}, down {down.dtype}, not {list(expected)} {x.dtype}")
    if not (up.is_contiguous() and down.is_contiguous()):
        raise InternalError(f"down and up are at strides {list(down.stride())} and {list(up.stride())}, not contiguous")
    if scales.shape != down.shape[:1] or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise InternalError(f"scales are {list(scales.shape)} {scales.dtype}, not [{down.shape[0]}] float32")
