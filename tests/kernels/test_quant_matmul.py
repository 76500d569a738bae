from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from penstock.core.errors import InternalError
from penstock.kernels.quant_matmul import reference, weights
from penstock.kernels.quant_matmul.op import quant_matmul
from penstock.kernels.quant_matmul.weights import QuantWeight, dequantised
from penstock.tests.kernels.on_triton import DEVICE, DTYPES, assert_close, randn, run

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")


def weight_of(kind: str, outs: int, ins: int, group_size: int = 32) -> QuantWeight:
    dense = randn(outs, ins, seed=1).cpu()
    if kind == "fp8":
        return weights.to_fp8(dense)
    if kind != "int4":
        return weights.to_int8(dense, kind)
    codes = torch.randint(0, 256, (outs, ins // 2), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    scales = 0.1 + 0.05 * randn(outs, ins // group_size, seed=3).cpu()
    return QuantWeight("int4", codes, scales, -7.5 * scales)


def on_device(weight: QuantWeight) -> QuantWeight:
    minima = None if weight.minima is None else weight.minima.to(DEVICE)
    return QuantWeight(weight.kind, weight.data.to(DEVICE), weight.scales.to(DEVICE), minima)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "outs", "ins", "group_size"),
    [
        ("int4", 5, 32, 32),
        ("int4", 70, 96, 32),
        ("int4", 3, 384, 128),
        ("int4", 66, 192, 96),
        ("int8", 1, 1, 0),
        ("int8", 70, 100, 0),
        ("w8a8", 1, 1, 0),
        ("w8a8", 70, 100, 0),
        ("fp8", 1, 1, 0),
        ("fp8", 70, 100, 0),
    ],
)
@pytest.mark.parametrize("rows", [1, 19])
def test_equals_reference(rows: int, kind: str, outs: int, ins: int, group_size: int, dtype: torch.dtype) -> None:
    weight = weight_of(kind, outs, ins, group_size)
    x = (randn(rows, ins + 3) / ins**0.5).to(dtype)[:, 2:-1]
    assert_close(run(quant_matmul, x, on_device(weight)), reference.quant_matmul(x.cpu(), weight))


def test_more_rows_than_a_tile() -> None:
    weight, x = weight_of("int8", 5, 40), randn(130, 40) / 6
    assert_close(run(quant_matmul, x, on_device(weight)), reference.quant_matmul(x.cpu(), weight))


def test_no_rows_are_no_work() -> None:
    assert run(quant_matmul, randn(0, 40), on_device(weight_of("w8a8", 5, 40))).shape == (0, 5)


def test_row_of_zeros_is_zero() -> None:
    assert (run(quant_matmul, 0 * randn(2, 40), on_device(weight_of("w8a8", 5, 40))) == 0).all()


@pytest.mark.parametrize("kind", ["int8", "w8a8", "fp8"])
def test_rounding_is_within_half_a_step(kind: str) -> None:
    dense = randn(6, 50, seed=1).cpu()
    weight = weights.to_fp8(dense) if kind == "fp8" else weights.to_int8(dense, kind)
    step = dense.abs() * 2**-4 + weight.scales[:, None] * 2**-10 if kind == "fp8" else weight.scales[:, None] / 2
    assert ((dequantised(weight) - dense).abs() <= step * 1.001).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_gguf_blocks_mean_what_the_gguf_package_says(kind: str) -> None:
    dense = randn(7, 96).cpu().numpy()
    blocks = gguf.quants.quantize(dense, gguf.GGMLQuantizationType[kind])
    convert = weights.from_q4_0 if kind == "Q4_0" else weights.from_q4_1
    weight = convert(torch.from_numpy(blocks))
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(dequantised(weight).numpy(), expected, atol=1e-6)
    assert weight.group_size == 32


def int32(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


@pytest.fixture
def grouped() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [ins 128, outs 16], zeros and scales of groups of 64 columns; and no code is like another place's."""
    generator = np.random.default_rng(0)
    codes, zeros = generator.integers(0, 16, (128, 16)), generator.integers(1, 16, (2, 16))
    return codes, zeros, generator.random((2, 16)).astype(np.float16)


def meaning(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return ((codes - zeros.repeat(64, 0)) * scales.repeat(64, 0).astype(np.float32)).T


@pytest.mark.parametrize("zero_offset", [0, 1])
def test_gptq_layout(grouped, zero_offset: int) -> None:
    """Packed by the loop that the format is described with: eight codes of one output below each other."""
    codes, zeros, scales = grouped
    qweight = sum(codes[place::8].astype(np.int64) << 4 * place for place in range(8))
    qzeros = sum((zeros[:, place::8] - zero_offset).astype(np.int64) << 4 * place for place in range(8))
    g_idx = torch.arange(128) // 64
    weight = weights.from_gptq(int32(qweight), int32(qzeros), torch.from_numpy(scales), g_idx, zero_offset)
    np.testing.assert_allclose(dequantised(weight).numpy(), meaning(codes, zeros, scales), atol=1e-4)
    with pytest.raises(InternalError, match="act-order"):
        weights.from_gptq(int32(qweight), int32(qzeros), torch.from_numpy(scales), g_idx.flip(0), zero_offset)


def test_awq_layout(grouped) -> None:
    """Packed by the loop of its authors: of eight outputs side by side, first the even ones, then the odd ones."""
    codes, zeros, scales = grouped

    def packed(numbers: np.ndarray) -> torch.Tensor:
        words = np.zeros((len(numbers), 2), np.int64)
        for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words |= numbers[:, column::8].astype(np.int64) << 4 * place
        return int32(words)

    weight = weights.from_awq(packed(codes), packed(zeros), torch.from_numpy(scales))
    np.testing.assert_allclose(dequantised(weight).numpy(), meaning(codes, zeros, scales), atol=1e-4)
    assert weight.group_size == 64


INT4 = weight_of("int4", 5, 64)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (replace(INT4, kind="int3"), "'int3' is not one of"),
        (replace(INT4, data=INT4.data.to(torch.int8)), "int4 data is"),
        (replace(INT4, minima=None), "int4 without minima"),
        (replace(INT4, minima=INT4.scales[:, :1]), "minima are"),
        (replace(INT4, scales=INT4.scales[:4]), "scales are"),
        (replace(INT4, scales=torch.zeros(5, 4), minima=torch.zeros(5, 4)), "64 columns in 4 groups"),
        (replace(weight_of("int8", 5, 64), minima=INT4.minima), "int8 with minima"),
    ],
)
def test_weight_that_does_not_fit_is_refused(weight: QuantWeight, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        quant_matmul(torch.zeros(2, 64), weight)


@pytest.mark.parametrize("x", [torch.zeros(64), torch.zeros(2, 63), torch.zeros(64, 2).T])
def test_rows_that_do_not_fit_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(InternalError, match=r"takes \[rows, 64\]"):
        quant_matmul(x, INT4)


def test_blocks_that_are_no_groups_are_refused() -> None:
    with pytest.raises(InternalError, match="groups of 18"):
        weights.from_q4_0(torch.zeros(2, 17, dtype=torch.uint8))
