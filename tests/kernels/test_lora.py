from __future__ import annotations

import pytest
import torch

from penstock.core.errors import InternalError
from penstock.kernels.lora import reference
from penstock.kernels.lora.op import add_lora
from penstock.kernels.lora.weights import Adapters
from penstock.tests.kernels.on_triton import DEVICE, DTYPES, assert_close, randn, run

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

import triton.language as tl  # noqa: E402

from penstock.kernels.lora.kernel import weight_offset  # noqa: E402


def adapters_of(num_adapters: int, inner: int, ins: int, outs: int, dtype: torch.dtype) -> Adapters:
    """Adapters of different inner sizes, padded with zeros to `inner`."""
    down = randn(num_adapters, inner, ins, seed=1) / ins**0.5
    up = randn(num_adapters, outs, inner, seed=2) / inner**0.5
    for adapter in range(num_adapters):
        own = max(1, inner - 3 * adapter)
        down[adapter, own:] = 0
        up[adapter, :, own:] = 0
    return Adapters(down.to(dtype), up.to(dtype), torch.linspace(0.5, 2, num_adapters, device=DEVICE))


def on_cpu(adapters: Adapters) -> Adapters:
    return Adapters(adapters.down.cpu(), adapters.up.cpu(), adapters.scales.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inner", "ins", "outs"), [(1, 1, 1, 1), (5, 3, 10, 7), (19, 8, 70, 65), (33, 17, 64, 130)]
)
def test_equals_reference(rows: int, inner: int, ins: int, outs: int, dtype: torch.dtype) -> None:
    weights = adapters_of(4, inner, ins, outs, dtype)
    adapters = torch.tensor([(3, 3, -1, 0, 2)[n % 5] for n in range(rows)], dtype=torch.int32, device=DEVICE)
    x, y = randn(rows, ins + 3, dtype=dtype)[:, 1:-2], randn(rows, outs + 4, dtype=dtype, seed=5)
    before, expected = y.clone(), y.cpu().clone()
    reference.add_lora(expected[:, 2:-2], x.cpu(), on_cpu(weights), adapters.cpu())
    run(add_lora, y[:, 2:-2], x, weights, adapters)
    assert_close(y, expected)
    assert torch.equal(y[adapters < 0], before[adapters < 0])


def test_reference_is_the_product_of_the_paper() -> None:
    own = on_cpu(adapters_of(2, 3, 10, 7, torch.float32))
    x, y = randn(4, 10).cpu(), torch.zeros(4, 7)
    reference.add_lora(y, x, own, torch.ones(4, dtype=torch.int32))
    assert_close(y, x @ (own.scales[1] * own.up[1] @ own.down[1]).T)


def test_broken_adapter_breaks_no_row_of_another() -> None:
    weights = adapters_of(3, 4, 10, 7, torch.float32)
    weights.down[1] = torch.nan
    adapters = torch.tensor([0, 1, 2, -1], dtype=torch.int32, device=DEVICE)
    y = torch.zeros(4, 7, device=DEVICE)
    run(add_lora, y, randn(4, 10), weights, adapters)
    assert y.isnan().any(dim=1).tolist() == [False, True, False, False]


def test_rows_without_adapters_and_no_rows_are_no_work() -> None:
    weights = adapters_of(2, 3, 10, 7, torch.float32)
    y = randn(4, 7)
    before = y.clone()
    run(add_lora, y, randn(4, 10), weights, torch.full((4,), -1, dtype=torch.int32, device=DEVICE))
    assert torch.equal(y, before)
    run(add_lora, y[:0], randn(0, 10), weights, torch.zeros(0, dtype=torch.int32, device=DEVICE))


@triton.jit
def _offsets(adapters, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, weight_offset(tl.load(adapters + index), index, 64, 14336))


def test_offsets_beyond_two_to_the_31_are_python_s_own() -> None:
    adapters = torch.tensor([0, 17, 4000, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _offsets[(1,)](adapters, out, SIZE=4)
    assert out.tolist() == [(adapter * 64 + row) * 14336 for row, adapter in enumerate(adapters.tolist())]


DOWN, UP, SCALES = torch.zeros(2, 3, 10), torch.zeros(2, 7, 3), torch.zeros(2)
X, Y, NONE = torch.zeros(4, 10), torch.zeros(4, 7), torch.full((4,), -1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((Y[:3], X, DOWN, UP, SCALES, NONE), r"y is \[3, 7\]"),
        ((Y.half(), X, DOWN, UP, SCALES, NONE), "torch.float16"),
        ((Y, X.T, DOWN, UP, SCALES, NONE), "x is"),
        ((Y, X, DOWN[:, :, 1:], UP, SCALES, NONE), "down is"),
        ((Y, X, DOWN, UP[:1], SCALES, NONE), "up is"),
        ((Y, X, DOWN, torch.zeros(2, 3, 7).transpose(1, 2), SCALES, NONE), "not contiguous"),
        ((Y, X, DOWN, UP, SCALES[:1], NONE), "scales are"),
        ((Y, X, DOWN, UP, SCALES, NONE.long()), "chosen is"),
    ],
)
def test_what_does_not_fit_is_refused(args, message: str) -> None:
    y, x, *weights, chosen = args
    with pytest.raises(InternalError, match=message):
        add_lora(y, x, Adapters(*weights), chosen)
