from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import InternalError
from penstock.kernels.wire_format import op, reference
from penstock.kernels.wire_format.formats import (
    CACHE_DTYPES,
    ITEM_BYTES,
    WIRE_DTYPES,
    narrowest_lossless,
    wire_layer_bytes,
)
from penstock.kernels.wire_format.measure import measure_conversion
from penstock.kernels.wire_format.reference import saturated

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAIRS = list(product(CACHE_DTYPES, CACHE_DTYPES))
NAN = float("nan")


def random_kv(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Heads of very different size, as in a real cache, and the last slots of each block empty."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(shape, generator=generator) * spread
    kv *= torch.logspace(-2, 2, shape[3])[:, None]
    kv[:, :, shape[2] - shape[2] // 3 :] = 0
    return kv.to(dtype)


def encoded(kv: torch.Tensor, wire_dtype: str) -> torch.Tensor:
    num_blocks, _, block_size, num_kv_heads, head_dim = kv.shape
    width = wire_layer_bytes(block_size, num_kv_heads, head_dim, wire_dtype)
    out = torch.full((num_blocks, width), 0xFF, dtype=torch.uint8)
    op.encode(kv, out, wire_dtype)
    return out


def decoded(data: torch.Tensor, shape: torch.Size, dtype: torch.dtype, wire_dtype: str) -> torch.Tensor:
    out = torch.full(shape, NAN, dtype=dtype)
    op.decode(data, out, wire_dtype)
    return out


def round_trip(kv: torch.Tensor, wire_dtype: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    return decoded(encoded(kv, wire_dtype), kv.shape, dtype or kv.dtype, wire_dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("shape", [(3, 2, 5, 3, 7), (1, 2, 1, 1, 1), (2, 2, 16, 2, 8)], ids=str)
def test_op_equals_reference_in_every_bit(wire_dtype: str, source: str, target: str, shape: tuple[int, ...]) -> None:
    kv = random_kv(shape, TORCH[source])
    data = encoded(kv, wire_dtype)
    assert torch.equal(data, reference.encode(kv, wire_dtype))
    expected = reference.decode(data, kv.shape, TORCH[target], wire_dtype)
    assert torch.equal(bits(decoded(data, kv.shape, TORCH[target], wire_dtype)), bits(expected))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(WIRE_DTYPES),
    st.sampled_from(CACHE_DTYPES),
    st.sampled_from(CACHE_DTYPES),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8),
)
def test_any_finite_numbers_stay_finite_and_as_the_reference_has_them(wire_dtype, source, target, numbers) -> None:
    kv = saturated(torch.tensor(numbers), TORCH[source]).view(1, 2, 2, 2, 1)
    data = encoded(kv, wire_dtype)
    assert torch.equal(data, reference.encode(kv, wire_dtype))
    out = decoded(data, kv.shape, TORCH[target], wire_dtype)
    assert torch.equal(bits(out), bits(reference.decode(data, kv.shape, TORCH[target], wire_dtype)))
    assert out.isfinite().all()


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("cache", CACHE_DTYPES)
def test_strided_views_are_read_and_written_in_place(wire_dtype: str, cache: str) -> None:
    pool = random_kv((4 * 3, 2, 6, 2, 5), TORCH[cache]).view(4, 3, 2, 6, 2, 5)
    layer = pool[torch.tensor([3, 0, 2])][:, 1]  # one layer of three blocks
    head_major = layer.transpose(2, 3).contiguous().transpose(2, 3)
    plain = encoded(layer.contiguous(), wire_dtype)
    assert torch.equal(encoded(layer, wire_dtype), plain)
    assert torch.equal(encoded(head_major, wire_dtype), plain)
    target = torch.full_like(pool, NAN)
    op.decode(plain, target[1:, 2], wire_dtype)
    assert torch.equal(bits(target[1:, 2]), bits(decoded(plain, layer.shape, TORCH[cache], wire_dtype)))
    assert target[0].isnan().all()
    assert target[1:, :2].isnan().all()


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_wire_blocks_may_lie_at_any_address_and_distance(wire_dtype: str, offset: int) -> None:
    kv = random_kv((3, 2, 3, 1, 3), torch.float32)
    width = wire_layer_bytes(3, 1, 3, wire_dtype)
    staging = torch.full((offset + 3 * (width + 3),), 0xAB, dtype=torch.uint8)
    rows = staging[offset:].view(3, width + 3)[:, :width]
    op.encode(kv, rows, wire_dtype)
    assert torch.equal(rows, encoded(kv, wire_dtype))
    assert (staging[offset:].view(3, width + 3)[:, width:] == 0xAB).all()
    assert (staging[:offset] == 0xAB).all()
    assert torch.equal(decoded(rows, kv.shape, torch.float32, wire_dtype), round_trip(kv, wire_dtype))


@pytest.mark.parametrize("cache", CACHE_DTYPES)
def test_equal_types_copy_bits_even_of_numbers_that_are_none(cache: str) -> None:
    kv = torch.arange(4 * 2 * 4 * 3 * 5 * 7, dtype=torch.int16).view(TORCH[cache])[: 4 * 2 * 4 * 3 * 5]
    kv = torch.cat((kv[:-3], torch.tensor([NAN, float("inf"), -0.0], dtype=TORCH[cache]))).view(4, 2, 4, 3, 5)
    assert torch.equal(bits(round_trip(kv, cache)), bits(kv))


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e6, 1e37])
def test_lossless_format_loses_what_the_target_cannot_hold_and_no_more(source: str, target: str, spread: float) -> None:
    kv = saturated(random_kv((2, 2, 4, 3, 5), torch.float32, spread=spread), TORCH[source])
    wire_dtype = narrowest_lossless(source, target)
    expected = saturated(kv, TORCH[target])  # what the target would have stored itself
    assert torch.equal(bits(round_trip(kv, wire_dtype, TORCH[target])), bits(expected))
    assert ITEM_BYTES[wire_dtype] == min(ITEM_BYTES[source], ITEM_BYTES[target])


def test_next_narrower_formats_are_not_lossless() -> None:
    kv = random_kv((2, 2, 4, 3, 5), torch.float32)
    for source, target in PAIRS:
        start = kv.to(TORCH[source])
        wanted = start.to(TORCH[target])
        width = ITEM_BYTES[narrowest_lossless(source, target)]
        narrower = [name for name in WIRE_DTYPES if ITEM_BYTES[name] < width]
        assert narrower
        assert not any(torch.equal(round_trip(start, name, TORCH[target]), wanted) for name in narrower)


def head_maximum(kv: torch.Tensor) -> torch.Tensor:
    return kv.abs().amax(dim=(2, 4), keepdim=True)


# |error| <= a share of |x| + a share of the head's maximum + a constant: half a step of each format, where its numbers
# are evenly spaced in proportion and where they are evenly spaced.
BOUNDS = {
    "float32": (0.0, 0.0, 0.0),
    "bfloat16": (2**-8, 0.0, 0.0),
    "float16": (2**-11, 0.0, 2**-25),
    "fp8_e4m3": (2**-4, 2**-10 / 448, 0.0),
    "int8": (0.0, 0.5 / 127, 0.0),
}


def beyond_bound(kv: torch.Tensor, out: torch.Tensor, wire_dtype: str) -> int:
    of_value, of_maximum, constant = BOUNDS[wire_dtype]
    bound = of_value * kv.abs() + of_maximum * head_maximum(kv) + constant
    return int(((out - kv).abs() > bound * (1 + 1e-5)).sum())


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_error_stays_within_half_a_step(wire_dtype: str, seed: int) -> None:
    kv = random_kv((4, 2, 16, 3, 8), torch.float32, seed)
    assert beyond_bound(kv, round_trip(kv, wire_dtype), wire_dtype) == 0


def test_error_beyond_the_bound_is_noticed() -> None:
    kv = random_kv((4, 2, 16, 3, 8), torch.float32)
    truncated = (kv / head_maximum(kv) * 127).trunc() / 127 * head_maximum(kv)  # a format that forgets to round
    assert beyond_bound(kv, truncated, "int8") > 100
    wrong_head = round_trip(kv, "int8").roll(1, dims=3)
    assert beyond_bound(kv, wrong_head, "int8") > 100


@pytest.mark.parametrize("wire_dtype", ["int8", "fp8_e4m3"])
def test_each_head_of_k_and_v_has_its_own_scale(wire_dtype: str) -> None:
    kv = torch.ones(2, 2, 4, 3, 5) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    kv[0, 1] *= 7
    scales = encoded(kv, wire_dtype)[:, 2 * 4 * 3 * 5 :].contiguous().view(torch.float32).view(2, 2, 3)
    largest = 127 if wire_dtype == "int8" else 448
    assert torch.equal(scales, kv.amax(dim=(2, 4)) / largest)
    assert torch.allclose(round_trip(kv, wire_dtype), kv, rtol=1e-6)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_zeros_stay_zeros(wire_dtype: str) -> None:
    kv = torch.zeros(2, 2, 4, 3, 5)
    assert (encoded(kv, wire_dtype) == 0).all()
    assert torch.equal(round_trip(kv, wire_dtype), kv)


@pytest.mark.parametrize("wire_dtype", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("size", [1e-45, 7e-43, 1e-40, 1e-37, 3.4028234663852886e38])
def test_heads_at_either_end_of_float32_survive(wire_dtype: str, size: float) -> None:
    kv = torch.tensor([size, -size, size / 2, 0.0]).view(1, 2, 1, 1, 2)
    out = round_trip(kv, wire_dtype)
    assert out.isfinite().all()
    assert ((out - kv).abs() <= kv.abs() * 2**-4 + 1e-42).all()


@pytest.mark.parametrize(("source", "wire_dtype", "target"), [
    ("float32", "float16", "float32"),
    ("bfloat16", "float16", "bfloat16"),
    ("float32", "float32", "float16"),
    ("bfloat16", "bfloat16", "float16"),
    ("float32", "int8", "float16"),
    ("bfloat16", "fp8_e4m3", "float16"),
])  # fmt: skip
def test_what_float16_cannot_hold_becomes_its_largest(source: str, wire_dtype: str, target: str) -> None:
    kv = torch.tensor([70000.0, -1e30, 65519.0, -70000.0]).view(1, 2, 1, 2, 1).to(TORCH[source])
    out = round_trip(kv, wire_dtype, TORCH[target])
    largest = torch.tensor(65504.0).to(TORCH[target])
    assert torch.equal(out.abs(), largest.expand_as(out))
    assert torch.equal(out.sign(), kv.sign().to(TORCH[target]))


def test_largest_float32_becomes_the_largest_bfloat16() -> None:
    kv = torch.full((1, 2, 1, 1, 1), torch.finfo(torch.float32).max)
    assert (round_trip(kv, "bfloat16", torch.bfloat16) == torch.finfo(torch.bfloat16).max).all()


@pytest.mark.parametrize("wire_dtype", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_head_with_a_broken_number_is_broken_and_no_other(wire_dtype: str, bad: float) -> None:
    kv = random_kv((2, 2, 4, 3, 5), torch.float32)
    kv[1, 0, 2, 1, 3] = bad
    assert torch.equal(encoded(kv, wire_dtype)[:, :-24], reference.encode(kv, wire_dtype)[:, :-24])
    out = round_trip(kv, wire_dtype)
    assert out[1, 0, :, 1].isnan().all()
    out[1, 0, :, 1] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_no_blocks_are_no_work(wire_dtype: str) -> None:
    assert round_trip(torch.zeros(0, 2, 4, 3, 5), wire_dtype).shape == (0, 2, 4, 3, 5)


@pytest.mark.parametrize(
    ("wire_dtype", "expected"), [("float32", 480), ("bfloat16", 240), ("float16", 240), ("int8", 144)]
)
def test_sizes(wire_dtype: str, expected: int) -> None:
    assert wire_layer_bytes(4, 3, 5, wire_dtype) == expected


KV = torch.zeros(2, 2, 4, 3, 5)
OUT = torch.zeros(2, 480, dtype=torch.uint8)


@pytest.mark.parametrize("convert", [op.encode, lambda kv, data, wire: op.decode(data, kv, wire)])
@pytest.mark.parametrize(
    ("kv", "data", "wire_dtype", "message"),
    [
        (KV[0], OUT, "float32", r"kv is \[2, 4, 3, 5\] torch.float32, not \[n, 2, block_size"),
        (torch.zeros(2, 3, 4, 3, 5), OUT, "float32", r"kv is \[2, 3, 4, 3, 5\]"),
        (KV.to(torch.float64), OUT, "float32", "torch.float64, not"),
        (KV, OUT, "bfloat16", r"bfloat16 takes \[2, 240\] torch.uint8 in dense rows"),
        (KV, OUT[:1], "float32", r"wire blocks are \[1, 480\] torch.uint8"),
        (KV, OUT.to(torch.int8), "float32", "torch.int8"),
        (KV, torch.zeros(480, 2, dtype=torch.uint8).T, "float32", r"at strides \[1, 2\]"),
        (KV, OUT.to("meta"), "float32", "wire blocks are on meta, kv is on cpu"),
        (KV, OUT, "float8", "wire_dtype: 'float8' is not one of float32, float16, bfloat16, int8, fp8_e4m3"),
    ],
)
def test_what_does_not_fit_is_refused(convert: Callable[..., None], kv, data, wire_dtype: str, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        convert(kv, data, wire_dtype)


@pytest.mark.parametrize(("source", "target", "field"), [("int8", "float32", "source"), ("float32", "fp8", "target")])
def test_lossless_between_what_are_no_caches_is_refused(source: str, target: str, field: str) -> None:
    with pytest.raises(InternalError, match=f"{field}_dtype"):
        narrowest_lossless(source, target)


def test_conversion_rate_is_cache_bytes_over_the_fastest_round() -> None:
    ticks = iter([0.0, 9.0, 10.0, 14.0, 20.0, 22.0, 30.0, 33.0])  # one to warm up, then 4, 2 and 3 seconds
    rate = measure_conversion(
        (4, 3, 5), torch.bfloat16, torch.float32, "int8", lambda: next(ticks), num_wire_blocks=8, rounds=3
    )
    assert rate == 8 * 2 * 4 * 3 * 5 * 2 / 2.0
