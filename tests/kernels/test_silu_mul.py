from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from penstock.core.errors import InternalError
from penstock.kernels.silu_mul import reference
from penstock.kernels.silu_mul.op import silu_mul
from penstock.tests.kernels.on_triton import DEVICE, DTYPES, assert_close, randn, run

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inner"), [(1, 1), (3, 7), (2, 64), (1, 2049)])
def test_equals_reference(rows: int, inner: int, dtype: torch.dtype) -> None:
    x = 4 * randn(rows, 2 * inner, dtype=dtype)
    assert_close(run(silu_mul, x), reference.silu_mul(x.cpu()))


def test_reference_equals_torch() -> None:
    x = randn(3, 14)
    assert_close(reference.silu_mul(x), F.silu(x[:, :7]) * x[:, 7:])


def test_gates_at_either_end_do_not_overflow() -> None:
    x = torch.tensor([[-1e30, -200.0, 0.0, 200.0, 1e30, 1.0, 1.0, 1.0, 1.0, 1.0]])
    out = run(silu_mul, x.to(DEVICE))
    assert_close(out, torch.tensor([[0.0, 0.0, 0.0, 200.0, 1e30]]))


def test_strided_rows_are_read_in_place() -> None:
    x = randn(4, 50)[:, 3:29]
    assert_close(run(silu_mul, x), reference.silu_mul(x.cpu()))


def test_no_rows_are_no_work() -> None:
    assert run(silu_mul, randn(0, 8)).shape == (0, 4)


@pytest.mark.parametrize("x", [torch.zeros(4), torch.zeros(2, 5), torch.zeros(2, 0), torch.zeros(4, 2).T])
def test_what_does_not_fit_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(InternalError, match="of floats in dense rows"):
        silu_mul(x)
