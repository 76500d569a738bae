"""Quantised weights in the one layout that the kernels read, and what makes it of the layouts that files have.

All functions are pure. `dequantised` says what a weight means; every conversion is tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.errors import InternalError

GROUP = 32  # columns of a GGUF group; other groups are a multiple of it
KINDS = ("int4", "int8", "w8a8", "fp8")
# AWQ puts column ORDER[i] of each eight into bits 4i to 4i + 3.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, eq=False)
class QuantWeight:
    """A weight [outs, ins].

    int4: data [outs, ins/2] uint8, column 2i in the low half of byte i; number = code · scale + minimum, scales and
    minima [outs, ins / group size] float32. int8, w8a8: data [outs, ins] int8, and fp8: data [outs, ins] uint8 of
    E4M3 codes; number = code · scale, scales [outs] float32. With w8a8 the rows of x are rounded to 8 bits too.
    """

    kind: str
    data: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None

    @property
    def outs(self) -> int:
        return self.data.shape[0]

    @property
    def ins(self) -> int:
        return self.data.shape[1] * (2 if self.kind == "int4" else 1)

    @property
    def group_size(self) -> int:
        """Columns that share a scale; 0 where a whole row does."""
        return self.ins // self.scales.shape[1] if self.kind == "int4" else 0


def dequantised(weight: QuantWeight) -> torch.Tensor:
    """The numbers [outs, ins] in float32."""
    if weight.kind == "fp8":
        return weight.data.view(torch.float8_e4m3fn).float() * weight.scales[:, None]
    if weight.minima is None:
        return weight.data.float() * weight.scales[:, None]
    codes = torch.stack((weight.data & 15, weight.data >> 4), dim=-1).flatten(1).float()
    scales, minima = (x.repeat_interleave(weight.group_size, dim=1) for x in (weight.scales, weight.minima))
    return codes * scales + minima


def to_int8(weight: torch.Tensor, kind: str = "int8") -> QuantWeight:
    """Round [outs, ins] to 8 bits, one scale for each output; kind "int8" or "w8a8"."""
    codes, scales = rounded_rows(weight)
    return QuantWeight(kind, codes, scales)


def rounded_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes, of the same shape, and the scale of each row."""
    scales = x.float().abs().amax(dim=1) / 127
    return (x.float() / torch.where(scales > 0, scales, 1)[:, None]).clamp(-127, 127).round().to(torch.int8), scales


def to_fp8(weight: torch.Tensor) -> QuantWeight:
    """Round [outs, ins] to E4M3, one scale for each output."""
    scales = weight.float().abs().amax(dim=1) / 448
    quotients = (weight.float() / torch.where(scales > 0, scales, 1)[:, None]).clamp(-448, 448)
    return QuantWeight("fp8", quotients.to(torch.float8_e4m3fn).view(torch.uint8), scales)


def from_q4_0(blocks: torch.Tensor) -> QuantWeight:
    """GGUF Q4_0: bytes [outs, ins/32 · 18], a float16 scale and 16 bytes a group; number = (code - 8) · scale."""
    codes, scales = _gguf_groups(blocks, 18)
    return _int4(codes, scales[..., 0], -8 * scales[..., 0])


def from_q4_1(blocks: torch.Tensor) -> QuantWeight:
    """GGUF Q4_1: bytes [outs, ins/32 · 20], a float16 scale, a float16 minimum and 16 bytes a group."""
    codes, factors = _gguf_groups(blocks, 20)
    return _int4(codes, factors[..., 0], factors[..., 1])


def _gguf_groups(blocks: torch.Tensor, group_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [outs, ins] and the float16 numbers at the head of each group, [outs, groups, n] float32."""
    if blocks.dim() != 2 or blocks.dtype != torch.uint8 or blocks.shape[1] % group_bytes:
        raise InternalError(f"blocks are {list(blocks.shape)} {blocks.dtype}, not bytes in groups of {group_bytes}")
    groups = blocks.view(blocks.shape[0], -1, group_bytes)
    halves = groups[..., -GROUP // 2 :]  # the first 16 columns lie in the low halves
    codes = torch.cat((halves & 15, halves >> 4), dim=-1).flatten(1)
    return codes, groups[..., : group_bytes - GROUP // 2].contiguous().view(torch.float16).float()


def from_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None, zero_offset: int = 1
) -> QuantWeight:
    """GPTQ: qweight [ins/8, outs], qzeros [groups, outs/8] int32, scales [groups, outs], the first column lowest.

    number = (code - zero - zero_offset) · scale; files of the first format store zeros one too low. Columns in the
    order of their activations (`g_idx` out of order) are refused with InternalError.
    """
    codes = _nibbles(qweight, range(8)).transpose(1, 2).flatten(0, 1)  # [ins, outs]
    zeros = _nibbles(qzeros, range(8)).flatten(1) + zero_offset
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(len(codes)) // (len(codes) // len(scales))):
        raise InternalError(
            "g_idx: the columns are in the order of their activations; convert the file without act-order"
        )
    return _from_zeros(codes, zeros, scales)


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> QuantWeight:
    """AWQ: qweight [ins, outs/8], qzeros [groups, outs/8] int32, scales [groups, outs].

    number = (code - zero) · scale.
    """
    inverse = [_AWQ_ORDER.index(column) for column in range(8)]
    return _from_zeros(_nibbles(qweight, inverse).flatten(1), _nibbles(qzeros, inverse).flatten(1), scales)


def _nibbles(words: torch.Tensor, order: list[int] | range) -> torch.Tensor:
    """The eight 4-bit codes of each int32, [*shape, 8] uint8, in this order of their places."""
    return torch.stack([words >> (4 * place) & 15 for place in order], dim=-1).to(torch.uint8)


def _from_zeros(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> QuantWeight:
    """codes [ins, outs], zeros and scales [groups, outs]."""
    if zeros.shape != scales.shape or codes.shape[1] != scales.shape[1] or codes.shape[0] % scales.shape[0]:
        raise InternalError(f"codes {list(codes.shape)}, zeros {list(zeros.shape)}, scales {list(scales.shape)}")
    factors = scales.float().T
    return _int4(codes.T, factors, -zeros.float().T * factors)


def _int4(codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> QuantWeight:
    return QuantWeight(
        "int4", (codes[:, ::2] | codes[:, 1::2] << 4).contiguous(), scales.contiguous(), minima.contiguous()
    )
