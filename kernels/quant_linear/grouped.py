"""Weights in groups of 32 inputs: a whole number for each weight, a scale and a minimum for each group of an output.

    weight[out, in] = d[out, in // 32] · codes[out, in] + m[out, in // 32]

GGUF's Q4_0, Q4_1 and Q8_0 are of this form as they are; any other weight is rounded into it with 8 bits.
`pack` brings it into the order in which the kernel reads it (cpu.h draws it), `unpack` back.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...core.errors import InternalError

GROUP, BLOCK_OUTS = 32, 16
_SCALE_BYTES = 64
_ALIGNMENT = 64
_CHUNK_BYTES = 32 << 20

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True, eq=False)
class GroupedWeight:
    """codes [outs, ins] of `bits` (4 or 8) bits, d and m [outs, ins / 32]."""

    codes: Bytes
    d: Halves
    m: Halves
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        outs, ins = self.codes.shape
        return outs, ins

    def rows(self, order: npt.NDArray[np.int64]) -> GroupedWeight:
        """The outputs in another order."""
        return GroupedWeight(self.codes[order], self.d[order], self.m[order], self.bits)


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """`data` [blocks of 16 outputs, groups, bytes] begins on a cache line; `outs` of the outputs are real."""

    data: Bytes
    outs: int
    ins: int
    bits: int

    @property
    def padded_outs(self) -> int:
        return int(self.data.shape[0]) * BLOCK_OUTS


def group(weight: torch.Tensor) -> GroupedWeight:
    """Round weight [outs, ins] to 8 bits: the largest magnitude of a group becomes 127.

    Raises InternalError when `ins` is no multiple of 32.
    """
    outs, ins = weight.shape
    _check_ins(ins)
    values = weight.to(torch.float32).view(outs, ins // GROUP, GROUP)
    d = (values.abs().amax(dim=-1) / 127).to(torch.float16)
    step = d.to(torch.float32)
    inverse = torch.where(step > 0, 1 / step, 0.0)
    codes = (values * inverse[..., None]).round_().clamp_(-128, 127) + 128
    return GroupedWeight(codes.to(torch.uint8).view(outs, ins).numpy(), d.numpy(), (d * -128).numpy(), bits=8)


def group_in_4_bits(weight: torch.Tensor) -> GroupedWeight:
    """Round weight [outs, ins] to 4 bits: the least value of a group becomes 0, its largest 15.

    Raises InternalError when `ins` is no multiple of 32.
    """
    outs, ins = weight.shape
    _check_ins(ins)
    values = weight.to(torch.float32).view(outs, ins // GROUP, GROUP)
    m = values.amin(dim=-1).to(torch.float16)
    rest = values - m.to(torch.float32)[..., None]
    d = (rest.amax(dim=-1) / 15).to(torch.float16)
    step = d.to(torch.float32)
    inverse = torch.where(step > 0, 1 / step, 0.0)
    codes = (rest * inverse[..., None]).round_().clamp_(0, 15)
    return GroupedWeight(codes.to(torch.uint8).view(outs, ins).numpy(), d.numpy(), m.numpy(), bits=4)


def joined(weights: list[GroupedWeight]) -> GroupedWeight:
    """One weight whose outputs are those of `weights` in turn; 8 bits when any has 8, which changes no value."""
    return GroupedWeight(
        np.concatenate([weight.codes for weight in weights]),
        np.concatenate([weight.d for weight in weights]),
        np.concatenate([weight.m for weight in weights]),
        max(weight.bits for weight in weights),
    )


def expand(weight: GroupedWeight) -> torch.Tensor:
    """The values [outs, ins], float32."""
    outs, ins = weight.shape
    codes = torch.from_numpy(weight.codes).view(outs, -1, GROUP).to(torch.float32)
    d, m = (torch.from_numpy(scales.astype(np.float32))[..., None] for scales in (weight.d, weight.m))
    return (codes * d + m).view(outs, ins)


def pack(weight: GroupedWeight) -> PackedWeight:
    """For the kernel. Outputs are filled up to a multiple of 16 with zeros."""
    outs, ins = weight.shape
    _check_ins(ins)
    blocks, groups = -(-outs // BLOCK_OUTS), ins // GROUP
    nbytes = BLOCK_OUTS * GROUP * weight.bits // 8
    data = _aligned((blocks, groups, nbytes + _SCALE_BYTES))
    codes = _padded(weight.codes, blocks).reshape(blocks, BLOCK_OUTS, groups, GROUP)
    if weight.bits == 4:
        quads = codes.reshape(blocks, BLOCK_OUTS, groups, 4, 2, 4).transpose(0, 2, 3, 4, 1, 5)
        data[:, :, :nbytes] = (quads[:, :, :, 0] | quads[:, :, :, 1] << 4).reshape(blocks, groups, nbytes)
    else:
        quads = codes.reshape(blocks, BLOCK_OUTS, groups, 8, 4).transpose(0, 2, 3, 1, 4)
        data[:, :, :nbytes] = quads.reshape(blocks, groups, nbytes)
    for at, scales in ((nbytes, weight.d), (nbytes + _SCALE_BYTES // 2, weight.m)):
        columns = _padded(scales, blocks).reshape(blocks, BLOCK_OUTS, groups).transpose(0, 2, 1)
        data[:, :, at : at + _SCALE_BYTES // 2] = np.ascontiguousarray(columns).view(np.uint8)
    return PackedWeight(data, outs, ins, weight.bits)


def unpack(weight: PackedWeight) -> GroupedWeight:
    """What was packed."""
    blocks, groups, _ = weight.data.shape
    nbytes = BLOCK_OUTS * GROUP * weight.bits // 8
    raw = weight.data[:, :, :nbytes]
    if weight.bits == 4:
        quads = np.stack((raw & 15, raw >> 4), axis=-1).reshape(blocks, groups, 4, BLOCK_OUTS, 4, 2)
        codes = quads.transpose(0, 3, 1, 2, 5, 4)
    else:
        codes = raw.reshape(blocks, groups, 8, BLOCK_OUTS, 4).transpose(0, 3, 1, 2, 4)
    flat = np.ascontiguousarray(codes).reshape(-1, weight.ins)[: weight.outs]
    d, m = (_scales(weight, at) for at in (nbytes, nbytes + _SCALE_BYTES // 2))
    return GroupedWeight(flat, d, m, weight.bits)


def _scales(weight: PackedWeight, at: int) -> Halves:
    blocks, groups, _ = weight.data.shape
    raw = np.ascontiguousarray(weight.data[:, :, at : at + _SCALE_BYTES // 2]).view(np.float16)
    return np.ascontiguousarray(raw.reshape(blocks, groups, BLOCK_OUTS).transpose(0, 2, 1)).reshape(-1, groups)[
        : weight.outs
    ]


def _check_ins(ins: int) -> None:
    if ins % GROUP:
        raise InternalError(f"a weight with {ins} inputs cannot be cut into groups of {GROUP}")


def _padded(rows: npt.NDArray[Any], blocks: int) -> npt.NDArray[Any]:
    missing = blocks * BLOCK_OUTS - len(rows)
    return np.pad(rows, ((0, missing), (0, 0))) if missing else rows


class _Room:
    """Memory for packed weights, in pages as large as the system has: reading all of it at every step would else spend
    much of its time on finding pages.
    """

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def take(self, count: int) -> Bytes:
        """`count` bytes from the beginning of a cache line on; given back when nobody holds a part of their chunk."""
        with self._lock:
            if len(self._chunk) < count:
                self._chunk = _large_memory(max(count, _CHUNK_BYTES))
            taken, self._chunk = self._chunk[:count], self._chunk[-(-count // _ALIGNMENT) * _ALIGNMENT :]
            return taken


def _large_memory(count: int) -> Bytes:
    memory = mmap.mmap(-1, count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


_room = _Room()


def _aligned(shape: tuple[int, ...]) -> Bytes:
    return _room.take(int(np.prod(shape))).reshape(shape)
