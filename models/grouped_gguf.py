"""GGUF tensors that are grouped weights already: taken as they are, without going through floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..kernels.quant_linear.grouped import Bytes, GroupedWeight, Halves

_HALF_BYTES, _NIBBLE_BYTES = 2, 16


def grouped(raw: Bytes, format_name: str, shape: tuple[int, ...]) -> GroupedWeight | None:
    """The weight `raw` of `shape` (outs, ins), or None when its format is no grouped one of 32 inputs."""
    parse = _FORMATS.get(format_name)
    if parse is None or len(shape) != 2:
        return None
    outs, ins = shape
    codes, d, m, bits = parse(raw.reshape(outs * (ins // 32), -1))
    return GroupedWeight(codes.reshape(outs, ins), d.reshape(outs, -1), m.reshape(outs, -1), bits)


def _halves(blocks: Bytes, at: int) -> Halves:
    return np.ascontiguousarray(blocks[:, at : at + _HALF_BYTES]).view(np.float16)


def _nibbles(packed: Bytes) -> Bytes:
    """16 bytes → 32 numbers: all low halves, then all high halves."""
    return np.concatenate((packed & 0x0F, packed >> 4), axis=1)


def _q4_0(blocks: Bytes) -> tuple[Bytes, Halves, Halves, int]:
    d = _halves(blocks, 0)
    return _nibbles(blocks[:, 2:]), d, d * np.float16(-8), 4


def _q4_1(blocks: Bytes) -> tuple[Bytes, Halves, Halves, int]:
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2), 4


def _q8_0(blocks: Bytes) -> tuple[Bytes, Halves, Halves, int]:
    d = _halves(blocks, 0)
    return blocks[:, 2:] ^ np.uint8(0x80), d, d * np.float16(-128), 8  # q + 128


_FORMATS: dict[str, Callable[[Bytes], tuple[Bytes, Halves, Halves, int]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}

GROUPED_FORMATS = frozenset(_FORMATS)
