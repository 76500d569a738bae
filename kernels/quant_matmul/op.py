"""Products with weights of 4 or 8 bits, for devices that multiply tiles."""

from __future__ import annotations

import torch

from ...core.errors import InternalError
from ..choice import check_same_device, runs_triton
from . import reference
from .weights import GROUP, KINDS, QuantWeight

_TYPES = {"int4": torch.uint8, "int8": torch.int8, "w8a8": torch.int8, "fp8": torch.uint8}
MAX_WIDTH = 65536  # a program that rounds a row holds it


def quant_matmul(x: torch.Tensor, weight: QuantWeight) -> torch.Tensor:
    """x [rows, ins] · weight [outs, ins] transposed, [rows, outs] in the type of x; rows may be strided.

    x is float32, bfloat16 or float16; weights are expanded to that type, sums are float32. Raises InternalError.
    Reference: `reference.quant_matmul`.
    """
    _check_weight(weight)
    if x.dim() != 2 or x.shape[1] != weight.ins or not x.is_floating_point() or x.stride(1) != 1:
        raise InternalError(f"x is {list(x.shape)} {x.dtype}, the weight takes [rows, {weight.ins}] in dense rows")
    check_same_device(x=x, data=weight.data, scales=weight.scales, minima=weight.minima)
    if not runs_triton(x):
        return reference.quant_matmul(x, weight)
    from .kernel import launch

    out = torch.empty(x.shape[0], weight.outs, dtype=x.dtype, device=x.device)
    launch(x, weight, out)
    return out


def _check_weight(weight: QuantWeight) -> None:
    if weight.kind not in KINDS:
        raise InternalError(f"kind: {weight.kind!r} is not one of {', '.join(KINDS)}")
    data, scales, minima = weight.data, weight.scales, weight.minima
    if data.dim() != 2 or data.dtype != _TYPES[weight.kind] or data.stride(1) != 1 or not 0 < weight.ins <= MAX_WIDTH:
        raise InternalError(f"{weight.kind} data is {list(data.shape)} {data.dtype}, not dense {_TYPES[weight.kind]}")
    groups: tuple[int, ...] = (weight.outs, scales.shape[-1]) if weight.kind == "int4" else (weight.outs,)
    if scales.shape != groups or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise InternalError(f"scales are {list(scales.shape)} {scales.dtype}, not {list(groups)} float32")
    if (minima is None) != (weight.kind != "int4"):
        raise InternalError(f"{weight.kind} with{'out' if minima is None else ''} minima")
    if minima is None:
        return
    if minima.shape != groups or minima.dtype != torch.float32 or not minima.is_contiguous():
        raise InternalError(f"minima are {list(minima.shape)} {minima.dtype}, not {list(groups)} float32")
    if weight.ins % scales.shape[1] or weight.group_size % GROUP:
        raise InternalError(
            f"{weight.ins} columns in {scales.shape[1]} groups, whose size is not a multiple of {GROUP}"
        )
