from __future__ import annotations

import pytest
import torch

from penstock.kernels.linear import op
from penstock.kernels.linear.op import Linear, can_pack
from penstock.kernels.linear.reference import linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = sorted(TOLERANCE, key=str)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["packed", "plain"])
def _packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(op, "can_pack", lambda _: False)


@pytest.mark.usefixtures("_packing")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns_in", "columns_out"), [(1, 64, 48), (2, 33, 7), (7, 16, 130), (129, 100, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_equals_reference(
    dtype: torch.dtype, rows: int, columns_in: int, columns_out: int, has_bias: bool
) -> None:
    x = draw(rows, columns_in, dtype=dtype, seed=1)
    weight = draw(columns_out, columns_in, dtype=dtype) / columns_in**0.5
    bias = draw(columns_out, dtype=dtype, seed=2) if has_bias else None
    residual = draw(rows, columns_out, dtype=dtype, seed=3)
    layer, expected = Linear(weight, bias), linear(x, weight, bias)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(layer(x), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(layer.plus(x, residual), expected + residual, atol=2 * tolerance, rtol=tolerance)


def test_plus_leaves_its_inputs_alone() -> None:
    x, residual = draw(3, 32, dtype=torch.float32), draw(3, 16, dtype=torch.float32, seed=1)
    before = x.clone(), residual.clone()
    Linear(draw(16, 32, dtype=torch.float32)).plus(x, residual)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_other_types_are_not_packed() -> None:
    assert not can_pack(torch.float64)
    layer = Linear(draw(4, 8, dtype=torch.float64))
    assert not layer.is_packed
    assert layer(draw(2, 8, dtype=torch.float64)).shape == (2, 4)


def test_machine_without_the_packing_operator_uses_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("no such operator")

    can_pack.cache_clear()
    monkeypatch.setattr(op, "_pack", refuse)
    try:
        assert not Linear(draw(4, 8, dtype=torch.float32)).is_packed
    finally:
        can_pack.cache_clear()
