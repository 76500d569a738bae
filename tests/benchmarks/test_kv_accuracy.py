"""Caches of 8 bits predict nearly what a float32 cache does, whatever the chunks that fill them."""

from __future__ import annotations

import pytest
import torch

from penstock.benchmarks.kv_accuracy import CacheWay
from penstock.benchmarks.quant_accuracy import compare
from penstock.models.device_decoder import DeviceDecoder
from penstock.models.weights import load_weights
from penstock.testing.tiny_model import random_weights, tiny_config

CONFIG = tiny_config()
TEXT = [token * 71 % 320 for token in range(37)]


@pytest.mark.parametrize("chunk", [37, 5, 1])
def test_eight_bits_are_compared_with_float32(chunk: int) -> None:
    weights = load_weights(CONFIG, random_weights(CONFIG).items(), torch.float32)
    decoder = DeviceDecoder(CONFIG, weights, 64)
    caches = {"float32": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    ways = {name: CacheWay(decoder, dtype, chunk) for name, dtype in caches.items()}
    found = compare(CacheWay(decoder, torch.float32, len(TEXT)), ways, [TEXT])
    assert found["float32"]["divergence"] < 1e-5
    assert 1e-5 < found["int8"]["divergence"] < found["fp8"]["divergence"] < 0.3
