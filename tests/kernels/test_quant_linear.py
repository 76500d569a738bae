"""Grouped weights: packing and back, and the kernel at every level beside its float32 twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock.core.errors import InternalError
from penstock.kernels.native import library
from penstock.kernels.quant_linear import reference
from penstock.kernels.quant_linear.grouped import (
    GroupedWeight,
    expand,
    group,
    group_in_4_bits,
    joined,
    pack,
    unpack,
)
from penstock.kernels.quant_linear.op import QuantEmbedding, QuantLinear

from .native_levels import any_level, native_level

__all__ = ["any_level", "native_level"]

# (outputs, inputs): no multiples of 16 outputs, one group, many groups
SHAPES = [(1, 32), (16, 64), (50, 96), (200, 576), (33, 1536)]


def weight(outs: int, ins: int, bits: int, seed: int = 0) -> GroupedWeight:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (outs, ins), dtype=np.uint8)
    d = rng.uniform(0.001, 0.1, (outs, ins // 32)).astype(np.float16)
    return GroupedWeight(codes, d, (-d * rng.uniform(0, 1 << bits, d.shape)).astype(np.float16), bits)


def rows(count: int, ins: int, seed: int = 1) -> torch.Tensor:
    x = torch.randn(count, ins, generator=torch.Generator().manual_seed(seed))
    x[:, 0] *= 50  # an outlier
    x[-1, 32:64] = 0  # a group of zeros
    return x


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_weight_unpacks_to_itself(shape: tuple[int, int], bits: int) -> None:
    given = weight(*shape, bits)
    packed = pack(given)
    assert packed.data.ctypes.data % 64 == 0
    found = unpack(packed)
    for name in ("codes", "d", "m"):
        assert np.array_equal(getattr(found, name), getattr(given, name)), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_expanded_weight(any_level: str, shape: tuple[int, int], bits: int) -> None:
    outs, ins = shape
    given, bias = weight(outs, ins, bits), torch.randn(outs)
    linear = QuantLinear(given, bias)
    assert linear.is_native == (any_level != "off")
    for count in (1, 2, 3, 5, 8, 13):
        x = rows(count, ins)
        expected = reference.quant_linear(x.double(), expand(given).double(), bias.double())
        scale = float(expected.abs().max()) + 1
        assert torch.allclose(linear(x).double(), expected, rtol=0, atol=2e-6 * scale), (count, any_level)


@pytest.mark.parametrize("bits", [4, 8])
def test_row_has_the_same_bits_whatever_rows_stand_beside_it(native_level: str, bits: int) -> None:
    linear = QuantLinear(weight(70, 576, bits))
    x = rows(23, 576)
    together = linear(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(torch.cat([linear(one) for one in x.split(1)]), together)
            assert torch.equal(torch.cat([linear(some.contiguous()) for some in x.split(7)]), together)
    finally:
        torch.set_num_threads(before)


def test_levels_agree_on_every_bit() -> None:
    from .native_levels import at_level

    results = []
    for name in library.usable_levels():
        with at_level(name):
            results.append(QuantLinear(weight(48, 320, 8))(rows(9, 320)))
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_kernel_is_taken(native_level: str) -> None:
    before = library.calls["quant_linear"]
    QuantLinear(weight(16, 32, 4))(rows(1, 32))
    assert library.calls["quant_linear"] == before + 1


def test_rounding_to_eight_bits_loses_little() -> None:
    given = torch.randn(64, 256)
    error = (expand(group(given)) - given).abs().max()
    assert error <= given.abs().max() / 127 * 0.51


def test_rounding_to_four_bits_keeps_the_ends_of_a_group_and_errs_by_half_a_step() -> None:
    given = torch.randn(64, 256) + 3
    rounded = group_in_4_bits(given)
    assert rounded.bits == 4
    groups, steps = given.view(64, 8, 32), torch.from_numpy(rounded.d.astype("float32"))
    error = (expand(rounded).view(64, 8, 32) - groups).abs().amax(dim=-1)
    assert bool((error <= 0.51 * steps + 0.01).all())
    assert set(rounded.codes.ravel().tolist()) == set(range(16))
    flat = torch.full((16, 32), 0.5)
    assert torch.equal(expand(group_in_4_bits(flat)), flat)


def test_four_bits_beside_eight_change_no_value() -> None:
    parts = [weight(8, 64, 4), weight(24, 64, 8)]
    both = joined(parts)
    assert both.bits == 8
    assert torch.equal(expand(both), torch.cat([expand(part) for part in parts]))


def test_embedding_gives_the_rows_of_the_weight() -> None:
    given = weight(40, 96, 8)
    ids = torch.tensor([39, 0, 17, 17])
    assert torch.equal(QuantEmbedding(QuantLinear(given)).index_select(0, ids), expand(given)[ids])


@pytest.mark.parametrize("x", [torch.zeros(2, 31), torch.zeros(2, 64, dtype=torch.float64), torch.zeros(64)])
def test_rows_that_do_not_fit_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(InternalError, match=r"not \[rows, 32\] float32"):
        QuantLinear(weight(16, 32, 4))(x)


def test_weight_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(InternalError, match="40 inputs"):
        group(torch.zeros(4, 40))
