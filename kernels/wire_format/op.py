"""Between a cache and the wire: `encode` at the source, `decode` at the target. Format: see `formats`.

Rounding is to the nearest, ties to even; what is beyond the largest number of the wire or of the target's cache
becomes the largest, so finite numbers stay finite, and a NaN stays one. Where types are equal, bits are copied. An
8-bit format divides each head of K and of V in each block by its own scale: its largest magnitude over the format's
largest number. A head of zeros has scale 0 (one that stays below 1e-42 may, too). A head with an infinity or a NaN
has scale NaN and decodes as NaN throughout: such a cache is broken, and must not look sound.
"""

from __future__ import annotations

import torch

from ...core.errors import InternalError
from .formats import is_scaled, wire_layer_bytes

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EIGHT_BITS = {"fp8_e4m3": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}  # type, largest number


def encode(kv: torch.Tensor, out: torch.Tensor, wire_dtype: str) -> None:
    """Write the wire blocks of kv [n, 2, block_size, num_kv_heads, head_dim] into out [n, wire_layer_bytes] uint8.

    kv is float32, bfloat16 or float16 at any strides; the rows of `out` are dense, at any distance. Raises
    InternalError. Reference: `reference.encode`.
    """
    _check(kv, out, wire_dtype)
    numbers, scales = _parts(out, kv.shape, wire_dtype)
    if not is_scaled(wire_dtype):
        _write(_saturated(kv, _FLOATS[wire_dtype]), numbers, _FLOATS[wire_dtype])
        return
    dtype, largest = _EIGHT_BITS[wire_dtype]
    values = kv.to(torch.float32)
    scale = _scales(values, largest)
    _write(_quotients(values, scale[:, :, None, :, None], dtype, largest), numbers, dtype)
    _write(scale, scales, torch.float32)


def decode(data: torch.Tensor, out: torch.Tensor, wire_dtype: str) -> None:
    """Write the numbers of data [n, wire_layer_bytes] uint8 into out [n, 2, block_size, num_kv_heads, head_dim].

    `out` is float32, bfloat16 or float16 at any strides; all of it is written. Raises InternalError. Reference:
    `reference.decode`.
    """
    _check(out, data, wire_dtype)
    numbers, scales = _parts(data, out.shape, wire_dtype)
    if not is_scaled(wire_dtype):
        out.copy_(_saturated(_read(numbers, _FLOATS[wire_dtype]).view(out.shape), out.dtype))
        return
    codes = _read(numbers, _EIGHT_BITS[wire_dtype][0]).view(out.shape)
    scale = _read(scales, torch.float32).view(out.shape[0], 2, 1, out.shape[3], 1)
    largest = torch.finfo(out.dtype).max
    out.copy_(codes.to(torch.float32).mul_(scale).clamp_(-largest, largest))


def _check(kv: torch.Tensor, data: torch.Tensor, wire_dtype: str) -> None:
    if kv.dim() != 5 or kv.shape[1] != 2 or kv.dtype not in _FLOATS.values():
        raise InternalError(
            f"kv is {list(kv.shape)} {kv.dtype}, not [n, 2, block_size, num_kv_heads, head_dim] of {', '.join(_FLOATS)}"
        )
    width = wire_layer_bytes(kv.shape[2], kv.shape[3], kv.shape[4], wire_dtype)
    if data.shape != (kv.shape[0], width) or data.dtype != torch.uint8 or (width > 1 and data.stride(1) != 1):
        raise InternalError(
            f"wire blocks are {list(data.shape)} {data.dtype} at strides {list(data.stride())}, "
            f"{wire_dtype} takes [{kv.shape[0]}, {width}] torch.uint8 in dense rows"
        )
    if data.device != kv.device:
        raise InternalError(f"wire blocks are on {data.device}, kv is on {kv.device}")


def _parts(data: torch.Tensor, shape: torch.Size, wire_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the numbers and of the scales in each row."""
    scales = 8 * shape[3] if is_scaled(wire_dtype) else 0
    return data[:, : data.shape[1] - scales], data[:, data.shape[1] - scales :]


def _saturated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` that `dtype` can hold; rounding to it is left to the copy. Unchanged where nothing can be too large."""
    largest = torch.finfo(dtype).max
    if values.dtype == dtype or torch.finfo(values.dtype).max <= largest:
        return values
    return values.to(torch.float32).clamp(-largest, largest)  # in bfloat16 a limit would itself be rounded up


def _scales(values: torch.Tensor, largest: float) -> torch.Tensor:
    """[n, 2, num_kv_heads] of float32 values [n, 2, block_size, num_kv_heads, head_dim]."""
    highest = values.abs().amax(dim=(2, 4))
    return torch.where(highest.isfinite(), highest / largest, torch.nan)


def _quotients(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, largest: float) -> torch.Tensor:
    """`values` in units of their scale, within the format's range. Where the scale is NaN it says all: these are 0."""
    quotients = (values / torch.where(scale > 0, scale, 1.0)).clamp_(-largest, largest)
    if scale.isnan().any():
        quotients.masked_fill_(scale.isnan(), 0.0)
    return quotients if dtype.is_floating_point else quotients.round_()


def _write(values: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> None:
    """Put `values` as `dtype` into the bytes of `rows`, directly where these are aligned."""
    if _is_aligned(rows, dtype):
        rows.view(dtype).view(values.shape).copy_(values)
    else:
        rows.copy_(values.to(dtype).contiguous().view(rows.shape[0], -1).view(torch.uint8))


def _read(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (rows if _is_aligned(rows, dtype) else rows.clone(memory_format=torch.contiguous_format)).view(dtype)


def _is_aligned(rows: torch.Tensor, dtype: torch.dtype) -> bool:
    places = (rows.data_ptr(), rows.storage_offset(), rows.stride(0), rows.shape[1])
    return all(place % dtype.itemsize == 0 for place in places)
