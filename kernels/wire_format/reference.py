"""Wire formats one head at a time, in float32, the nearest number sought rather than computed."""

from __future__ import annotations

import torch

from .formats import is_scaled

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def encode(kv: torch.Tensor, wire_dtype: str) -> torch.Tensor:
    """Wire blocks [n, wire_layer_bytes] uint8 of kv [n, 2, block_size, num_kv_heads, head_dim]."""
    if not is_scaled(wire_dtype):
        return torch.stack([_bytes(saturated(block, _FLOATS[wire_dtype])) for block in kv])
    wire_blocks = []
    for block in kv:
        codes = torch.empty(block.shape, dtype=torch.uint8)
        scales = torch.empty(2, block.shape[2])
        for part in range(2):
            for head in range(block.shape[2]):
                values = block[part, :, head].float()
                scales[part, head] = _scale(values, wire_dtype)
                codes[part, :, head] = _codes(values, scales[part, head], wire_dtype)
        wire_blocks.append(torch.cat((codes.flatten(), _bytes(scales))))
    return torch.stack(wire_blocks)


def decode(data: torch.Tensor, shape: torch.Size, dtype: torch.dtype, wire_dtype: str) -> torch.Tensor:
    """The numbers of these wire blocks in `dtype`; `shape` as of kv in `encode`."""
    return torch.stack([_decode_block(row.clone(), shape[1:], dtype, wire_dtype) for row in data])


def _decode_block(row: torch.Tensor, shape: torch.Size, dtype: torch.dtype, wire_dtype: str) -> torch.Tensor:
    if not is_scaled(wire_dtype):
        return saturated(row.view(_FLOATS[wire_dtype]).view(shape), dtype)
    codes, scales = row[: shape.numel()].view(shape), row[shape.numel() :].clone().view(torch.float32)
    out, largest = torch.empty(shape, dtype=dtype), torch.finfo(dtype).max
    for part in range(2):
        for head in range(shape[2]):
            scale = scales[part * shape[2] + head]
            # The largest float32 times its own rounded scale may be infinite.
            values = _numbers(wire_dtype)[codes[part, :, head].long()] * scale
            out[part, :, head] = values.clamp(-largest, largest).to(dtype)
    return out


def saturated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` rounded to the nearest in `dtype`; what is beyond its largest becomes its largest."""
    if values.dtype == dtype:
        return values.clone()
    largest = torch.finfo(dtype).max
    return values.float().clamp(-largest, largest).to(dtype)


def _numbers(wire_dtype: str) -> torch.Tensor:
    """The number that each of the 256 codes stands for, float32; NaN for a code that is not used."""
    codes = torch.arange(256, dtype=torch.uint8)
    if wire_dtype == "fp8_e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    numbers = codes.view(torch.int8).float()
    numbers[128] = torch.nan  # -128 is not used: the range is the same on both sides of zero
    return numbers


def _scale(values: torch.Tensor, wire_dtype: str) -> float:
    largest = values.abs().max()
    if not torch.isfinite(largest):
        return float("nan")
    return float(largest / (127 if wire_dtype == "int8" else 448))


def _codes(values: torch.Tensor, scale: torch.Tensor, wire_dtype: str) -> torch.Tensor:
    """The code of the nearest number for each of `values`, the even code of two that are equally near."""
    if scale.isnan():
        return torch.zeros(values.shape, dtype=torch.uint8)
    numbers = _numbers(wire_dtype)
    quotients = values / scale if scale > 0 else values
    distances = (quotients.double()[..., None] - numbers.double()).abs().nan_to_num(torch.inf)
    is_nearest = distances == distances.min(dim=-1, keepdim=True).values
    if wire_dtype == "fp8_e4m3":  # has two zeros: a negative number that is rounded to zero keeps its sign
        is_nearest &= torch.signbit(numbers) == torch.signbit(values)[..., None]
    codes = torch.arange(256)
    return torch.where(is_nearest, codes % 2 * 256 + codes, 1 << 20).argmin(dim=-1).to(torch.uint8)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().flatten().view(torch.uint8)
