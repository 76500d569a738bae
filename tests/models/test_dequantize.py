"""Every block format against the reference package, on random bytes."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.models.dequantize import FORMATS, dequantize


@pytest.mark.parametrize("kind", FORMATS)
def test_format_sizes_match_reference(kind: int) -> None:
    gguf = pytest.importorskip("gguf")
    reference = gguf.GGMLQuantizationType(kind)
    assert reference.name == FORMATS[kind].name
    assert gguf.GGML_QUANT_SIZES[reference] == (FORMATS[kind].block_size, FORMATS[kind].block_bytes)


@pytest.mark.parametrize("kind", FORMATS)
def test_dequantize_random_blocks_is_bit_equal_to_reference(kind: int) -> None:
    gguf = pytest.importorskip("gguf")
    raw = np.random.default_rng(kind).integers(0, 256, size=(37, 3 * FORMATS[kind].block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(kind)).reshape(-1)
    found = dequantize(raw.reshape(-1), FORMATS[kind])
    # Random scales are sometimes NaN, whose bits the processor chooses; everything else agrees to the bit.
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    is_number = ~np.isnan(expected)
    assert is_number.sum() > found.size // 2
    assert np.array_equal(found[is_number].view(np.uint32), expected[is_number].view(np.uint32))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_dequantize_quantised_weights_is_close_to_them(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name]
    weights = np.random.default_rng(1).standard_normal((16, 256)).astype(np.float32)
    found = dequantize(gguf.quantize(weights, kind).reshape(-1), FORMATS[kind.value]).reshape(weights.shape)
    steps = {"Q4": 15, "Q5": 31, "Q8": 255}[name[:2]]
    assert np.abs(found - weights).max() < 1.2 * (weights.max() - weights.min()) / steps


def test_dequantize_more_than_one_chunk_joins_them_in_order() -> None:
    values = np.arange(300_000, dtype=np.float32)
    raw = values.view(np.uint8)
    found = dequantize(raw, FORMATS[0])
    assert np.array_equal(found, values)
    assert not np.shares_memory(found, raw)


def test_dequantize_nothing_is_empty() -> None:
    assert dequantize(np.empty(0, dtype=np.uint8), FORMATS[14]).shape == (0,)


def test_dequantize_broken_scale_gives_no_warning() -> None:
    raw = np.full(FORMATS[12].block_bytes, 255, dtype=np.uint8)  # NaN scales
    assert np.isnan(dequantize(raw, FORMATS[12])).all()
