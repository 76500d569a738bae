from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from penstock.core.errors import InternalError
from penstock.kernels.rms_norm import reference
from penstock.kernels.rms_norm.op import add_rms_norm, qk_norm, rms_norm
from penstock.tests.kernels.on_triton import DTYPES, assert_close, randn, run

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

EPS = 1e-5
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 576), (1, 1025)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_equals_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = 3 * randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype, seed=1)
    assert_close(run(rms_norm, x, weight, EPS), reference.rms_norm(x.cpu(), weight.cpu(), EPS))


def test_reference_equals_torch() -> None:
    x, weight = randn(5, 64), randn(64, seed=1)
    assert_close(reference.rms_norm(x, weight, EPS), F.rms_norm(x, (64,), weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_sum_and_norm_equal_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=2), randn(shape[1], seed=1)
    total = residual.cpu().clone()
    expected = reference.add_rms_norm(x.cpu(), total, weight.cpu(), EPS)
    assert_close(run(add_rms_norm, x, residual, weight, EPS), expected)
    assert_close(residual, total)


def test_fused_equals_two_steps_in_every_bit() -> None:
    x, residual, weight = randn(4, 33, dtype=torch.float16), randn(4, 33, dtype=torch.float16, seed=2), randn(33)
    fused = run(add_rms_norm, x, residual, weight, EPS)
    assert torch.equal(fused, run(rms_norm, residual, weight, EPS))


def test_strided_rows_are_read_and_written_in_place() -> None:
    wide, other = randn(4, 50), randn(4, 90, seed=3)
    before = other.clone()
    x, residual, weight = wide[:, 9:42], other[:, 2:35], randn(33, seed=1)
    total = residual.cpu().clone()
    expected = reference.add_rms_norm(x.cpu(), total, weight.cpu(), EPS)
    assert_close(run(add_rms_norm, x, residual, weight, EPS), expected)
    assert_close(residual, total)
    assert torch.equal(other[:, 35:], before[:, 35:])
    assert torch.equal(other[:, :2], before[:, :2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 1), (6, 2, 10), (9, 3, 64), (16, 1, 5)])
def test_qk_norm_equals_reference(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    heads = num_heads + num_kv_heads
    qkv = randn(3, (heads + num_kv_heads) * head_dim, dtype=dtype)
    before = qkv.clone()
    qk = qkv[:, : heads * head_dim].view(3, heads, head_dim)
    q_weight, k_weight = randn(head_dim, dtype=dtype, seed=1), randn(head_dim, dtype=dtype, seed=2)
    expected = qk.cpu().clone()
    reference.qk_norm(expected, q_weight.cpu(), k_weight.cpu(), num_heads, EPS)
    run(qk_norm, qk, q_weight, k_weight, num_heads, EPS)
    assert_close(qk, expected)
    assert torch.equal(qkv[:, heads * head_dim :], before[:, heads * head_dim :])


def test_no_rows_are_no_work() -> None:
    assert run(rms_norm, randn(0, 8), randn(8), EPS).shape == (0, 8)
    run(qk_norm, randn(0, 3, 8), randn(8), randn(8), 2, EPS)


def test_op_without_triton_is_the_reference() -> None:
    x, weight = torch.randn(3, 7), torch.randn(7)
    assert torch.equal(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(4), torch.zeros(4), r"x is \[4\] torch.float32"),
        (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(4), "torch.int32"),
        (torch.zeros(4, 2).T, torch.zeros(4), r"at strides \[1, 2\]"),
        (torch.zeros(2, 4), torch.zeros(5), r"the weight is \[5\]"),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), "weight is on meta, x is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        rms_norm(x, weight, EPS)


def test_residual_of_another_type_is_refused() -> None:
    with pytest.raises(InternalError, match="the residual is"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.float16), torch.zeros(4), EPS)


def test_more_query_heads_than_heads_are_refused() -> None:
    with pytest.raises(InternalError, match="of which 4 heads"):
        qk_norm(torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(4), 4, EPS)
