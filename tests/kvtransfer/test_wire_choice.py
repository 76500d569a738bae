from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import InternalError
from penstock.kvtransfer.wire_choice import BlockShape, choose_wire_dtype, wire_candidates, wire_seconds

SHAPE = BlockShape(block_size=16, num_kv_heads=3, head_dim=64, source_dtype="bfloat16", target_dtype="bfloat16")
MIXED = BlockShape(block_size=16, num_kv_heads=3, head_dim=64, source_dtype="float32", target_dtype="bfloat16")
RATES = {"bfloat16": 4e9, "float16": 4e9, "int8": 1e9, "fp8_e4m3": 0.5e9}


@pytest.mark.parametrize("shape", [SHAPE, MIXED])
def test_fast_pipe_keeps_the_lossless_format(shape: BlockShape) -> None:
    assert choose_wire_dtype(wire_candidates(shape), shape, 1e12, RATES) == "bfloat16"


@pytest.mark.parametrize("shape", [SHAPE, MIXED])
def test_slow_pipe_takes_the_narrowest_format(shape: BlockShape) -> None:
    assert choose_wire_dtype(wire_candidates(shape), shape, 1e6, RATES) == "int8"


def test_slow_conversion_keeps_the_lossless_format_on_any_pipe_it_would_hold_up() -> None:
    assert choose_wire_dtype(wire_candidates(SHAPE), SHAPE, 1e8, {"int8": 1e8, "fp8_e4m3": 1e8}) == "bfloat16"


def test_choice_turns_where_the_saved_time_pays_for_the_conversion() -> None:
    # Half the bytes saved a wire second in two; conversion costs 1 ns a byte. Even at 0.5 GB/s, chosen below.
    candidates = ("bfloat16", "int8")
    rates = {"int8": 1e9}
    assert choose_wire_dtype(candidates, SHAPE, 0.51e9, rates, least_gain=0) == "bfloat16"
    assert choose_wire_dtype(candidates, SHAPE, 0.49e9, rates, least_gain=0) == "int8"
    assert choose_wire_dtype(candidates, SHAPE, 0.49e9, rates) == "bfloat16"  # a gain within the noise


def test_small_gain_over_an_exacter_format_is_not_taken() -> None:
    assert choose_wire_dtype(("int8", "fp8_e4m3"), SHAPE, 1e8, {"int8": 1e9, "fp8_e4m3": 1.1e9}) == "int8"
    assert choose_wire_dtype(("int8", "fp8_e4m3"), SHAPE, 1e9, {"int8": 1e9, "fp8_e4m3": 4e9}) == "fp8_e4m3"


def test_nothing_is_converted_where_both_caches_hold_the_wire_dtype() -> None:
    assert wire_seconds(SHAPE, "bfloat16", 1e9, {}) == 2 * 16 * 3 * 64 * 2 / 1e9
    assert wire_seconds(MIXED, "bfloat16", 1e9, {"bfloat16": 2e9}) == pytest.approx(12288 / 1e9 + 24576 / 2e9)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("float32", "float32", ("float32", "float16", "bfloat16", "int8", "fp8_e4m3")),
        ("bfloat16", "bfloat16", ("bfloat16", "int8", "fp8_e4m3")),
        ("float32", "bfloat16", ("bfloat16", "int8", "fp8_e4m3")),
        ("bfloat16", "float32", ("bfloat16", "int8", "fp8_e4m3")),
        ("float16", "bfloat16", ("float16", "int8", "fp8_e4m3")),
    ],
)
def test_candidates_begin_lossless_and_then_shrink(source: str, target: str, expected: tuple[str, ...]) -> None:
    assert wire_candidates(BlockShape(16, 3, 64, source, target)) == expected


def test_candidates_save_bytes_with_their_scales_counted() -> None:
    assert wire_candidates(BlockShape(1, 1, 2, "bfloat16", "bfloat16")) == ("bfloat16",)  # 8 bytes against 4 and 8


@given(st.lists(st.floats(1e3, 1e13), min_size=2, max_size=8), st.floats(1e6, 1e11))
def test_a_slower_pipe_never_takes_a_wider_format(bandwidths: list[float], rate: float) -> None:
    rates = dict.fromkeys(RATES, rate)
    chosen = [choose_wire_dtype(("bfloat16", "int8"), SHAPE, bandwidth, rates) for bandwidth in sorted(bandwidths)]
    assert all(SHAPE.wire_bytes(slow) <= SHAPE.wire_bytes(fast) for slow, fast in pairwise(chosen))


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan")])
def test_bandwidth_that_is_none_is_refused(bandwidth: float) -> None:
    with pytest.raises(InternalError, match="bandwidth_bytes_per_s"):
        choose_wire_dtype(("bfloat16",), SHAPE, bandwidth, RATES)


def test_candidate_without_a_measurement_is_refused() -> None:
    with pytest.raises(InternalError, match=r"convert_bytes_per_s\[int8\]: nan is not a positive"):
        choose_wire_dtype(("bfloat16", "int8"), SHAPE, 1e9, {})


def test_no_candidates_are_refused() -> None:
    with pytest.raises(InternalError, match="candidates: none given"):
        choose_wire_dtype((), SHAPE, 1e9, RATES)
