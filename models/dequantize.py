"""The block formats of GGUF tensors and how to turn them into float32, in numpy.

A quantised row is a run of blocks; each block packs `block_size` weights into `block_bytes` bytes with its own scale.
Results are bit-equal to the reference Python package `gguf`: the same float32 operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_CHUNK_VALUES = 1 << 18  # decoded at a time, so that temporaries stay in the processor's cache


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """`decode` maps blocks [n, block_bytes] to values [n, block_size]."""

    name: str
    block_size: int
    block_bytes: int
    decode: Callable[[Bytes], Floats]


def dequantize(raw: Bytes, kind: BlockFormat) -> Floats:
    """All the values in `raw` [n * block_bytes], flat. The result is a new array."""
    blocks = raw.reshape(-1, kind.block_bytes)
    out = np.empty((len(blocks), kind.block_size), dtype=np.float32)
    step = max(1, _CHUNK_VALUES // kind.block_size)
    # A broken scale may be inf or NaN; it has to come through as such, not as a warning.
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            out[start : start + step] = kind.decode(blocks[start : start + step])
    return out.reshape(-1)


def _half(blocks: Bytes, offset: int) -> Floats:
    """The float16 at `offset` of each block: [n, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[..., k] bytes to [..., 2, k]: all low halves, then all high halves."""
    return np.stack((packed & 0x0F, packed >> 4), axis=-2)


def _crumbs(packed: Bytes) -> Bytes:
    """[..., k] bytes to [..., 4, k]: the four two-bit fields, lowest first."""
    return (packed[..., None, :] >> np.array([[0], [2], [4], [6]], dtype=np.uint8)) & np.uint8(3)


def _fifth_bits(blocks: Bytes, offset: int) -> Bytes:
    """The 32 bits at `offset`, as 16 where set: [n, 32]."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[:, offset : offset + 4]), axis=1, bitorder="little")
    return bits << np.uint8(4)


def _f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return _half(blocks, 0)


def _bf16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: Bytes) -> Floats:
    """d, then 32 int8: x = d * q."""
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q4_0(blocks: Bytes) -> Floats:
    """d, then 32 nibbles: x = d * (q - 8)."""
    q = _nibbles(blocks[:, 2:]).reshape(-1, 32)
    return _half(blocks, 0) * (q.astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    """d, m, then 32 nibbles: x = d * q + m."""
    q = _nibbles(blocks[:, 4:]).reshape(-1, 32)
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    """d, 32 fifth bits, then 32 nibbles: x = d * (q - 16)."""
    q = _nibbles(blocks[:, 6:]).reshape(-1, 32) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (q.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    """d, m, 32 fifth bits, then 32 nibbles: x = d * q + m."""
    q = _nibbles(blocks[:, 8:]).reshape(-1, 32) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


def _q2_k(blocks: Bytes) -> Floats:
    """16 (scale, minimum) nibble pairs, 256 two-bit q, d, dmin: x = d * scale * q - dmin * minimum."""
    pairs = blocks[:, :16]
    scale = _half(blocks, 80) * (pairs & 0x0F).astype(np.float32)
    minimum = _half(blocks, 82) * (pairs >> 4).astype(np.float32)
    q = _crumbs(blocks[:, 16:80].reshape(-1, 2, 32)).reshape(-1, 16, 16)
    return (scale[..., None] * q.astype(np.float32) - minimum[..., None]).reshape(-1, 256)


def _q3_k(blocks: Bytes) -> Floats:
    """256 high bits, 256 two-bit q, 16 six-bit scales, d: x = d * (scale - 32) * (q - 4 where the high bit is 0)."""
    low = _nibbles(blocks[:, 96:104]).reshape(-1, 16)
    high = _crumbs(blocks[:, 104:108]).reshape(-1, 16)
    scale = _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32)
    bits = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # [n, 8, 32]
    q = _crumbs(blocks[:, 32:96].reshape(-1, 2, 32)).reshape(-1, 8, 32)
    centred = (q | bits << 2).astype(np.float32) - 4
    return (scale[..., None] * centred.reshape(-1, 16, 16)).reshape(-1, 256)


def _scales_and_minima(blocks: Bytes) -> tuple[Floats, Floats]:
    """d * scale and dmin * minimum of the 8 sub-blocks of Q4_K and Q5_K: [n, 8, 1] each.

    Twelve bytes hold eight six-bit scales and eight six-bit minima: the first four of each whole in bytes 0..7, the
    last four split between the nibbles of bytes 8..11 and the top two bits of bytes 0..7.
    """
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate((first & 63, (rest & 15) | (first >> 6) << 4), axis=1)
    minimum = np.concatenate((second & 63, (rest >> 4) | (second >> 6) << 4), axis=1)
    scaled = _half(blocks, 0) * scale.astype(np.float32), _half(blocks, 2) * minimum.astype(np.float32)
    return scaled[0][..., None], scaled[1][..., None]


def _q4_k(blocks: Bytes) -> Floats:
    """d, dmin, packed scales and minima, then 256 nibbles: x = d * scale * q - dmin * minimum."""
    scale, minimum = _scales_and_minima(blocks)
    q = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (scale * q.astype(np.float32) - minimum).reshape(-1, 256)


def _q5_k(blocks: Bytes) -> Floats:
    """Q4_K with 256 fifth bits before the nibbles; bit s of byte i belongs to value i of sub-block s."""
    scale, minimum = _scales_and_minima(blocks)
    bits = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # [n, 8, 32]
    q = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | bits << 4
    return (scale * q.astype(np.float32) - minimum).reshape(-1, 256)


def _q6_k(blocks: Bytes) -> Floats:
    """256 low nibbles, 256 two-bit tops, 16 int8 scales, d: x = d * scale * (q - 32)."""
    scale = _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    top = _crumbs(blocks[:, 128:192].reshape(-1, 2, 32)).reshape(-1, 8, 32)
    centred = (low | top << 4).astype(np.float32) - 32
    return (scale[..., None] * centred.reshape(-1, 16, 16)).reshape(-1, 256)


# Keyed by the type number in the file.
FORMATS: dict[int, BlockFormat] = {
    0: BlockFormat("F32", 1, 4, _f32),
    1: BlockFormat("F16", 1, 2, _f16),
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, _q5_0),
    7: BlockFormat("Q5_1", 32, 24, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    10: BlockFormat("Q2_K", 256, 84, _q2_k),
    11: BlockFormat("Q3_K", 256, 110, _q3_k),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    13: BlockFormat("Q5_K", 256, 176, _q5_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
    30: BlockFormat("BF16", 1, 2, _bf16),
}
