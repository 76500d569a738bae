"""The parts of several kernels, at every value that decides."""

from __future__ import annotations

import pytest
import torch

from penstock.tests.kernels.on_triton import DEVICE

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

import triton.language as tl  # noqa: E402

from penstock.kernels.triton_parts import e4m3_code, e4m3_number, int8_number, row_offset, whole  # noqa: E402


@triton.jit
def _offsets(out, rows, stride, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, row_offset(tl.load(rows + index), stride))


@triton.jit
def _codes(x, codes, wholes, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    values = tl.load(x + index)
    tl.store(codes + index, e4m3_code(values))
    tl.store(wholes + index, whole(values))


@triton.jit
def _numbers(codes, of_e4m3, of_int8, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    code = tl.load(codes + index)
    tl.store(of_e4m3 + index, e4m3_number(code))
    tl.store(of_int8 + index, int8_number(code))


def test_offset_of_a_row_is_int64() -> None:
    """Its twin is Python's own product."""
    rows = torch.tensor([0, 1, 70_000, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _offsets[(1,)](out, rows, 131_072, SIZE=4)
    assert out.tolist() == [row * 131_072 for row in rows.tolist()]


def test_codes_of_e4m3_are_those_of_torch_at_every_number_and_every_tie() -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat((numbers, ties, ties.nextafter(torch.zeros(())), ties.nextafter(torch.full((), 999.0))))
    values = torch.cat((values, -values, torch.tensor([1e-30, -1e-42] * 2)))
    values = torch.cat((values, torch.rand(2048 - len(values), generator=torch.Generator().manual_seed(0)) * 896 - 448))
    codes = torch.zeros(2048, dtype=torch.uint8, device=DEVICE)
    wholes = torch.zeros(2048, device=DEVICE)
    _codes[(1,)](values.to(DEVICE), codes, wholes, SIZE=2048)
    assert torch.equal(codes.cpu(), values.to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(wholes.cpu(), values.round())


def test_numbers_of_all_codes_are_those_of_torch() -> None:
    codes = torch.arange(256).to(torch.uint8)
    of_e4m3, of_int8 = torch.zeros(256, device=DEVICE), torch.zeros(256, device=DEVICE)
    _numbers[(1,)](codes.to(DEVICE), of_e4m3, of_int8, SIZE=256)
    torch.testing.assert_close(of_e4m3.cpu(), codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(of_int8.cpu(), codes.view(torch.int8).float())
