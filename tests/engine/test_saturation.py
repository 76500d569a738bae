"""The size of prefill chunks, from step times that are given and from a real network's."""

from __future__ import annotations

import pytest
import torch

from penstock.engine.saturation import CHUNKS, measure_saturation, saturation_tokens
from penstock.engine.torch_engine import build_decoder
from penstock.testing.tiny_model import random_weights, tiny_config


@pytest.mark.parametrize(
    ("fixed_s", "longest", "chosen"),
    [
        (0.0, 4096, 128),  # as fast for each token from the first on
        (0.005, 4096, 128),  # 256 tokens are 2 % faster
        (0.05, 4096, 512),  # 256: 1.16 times as fast, 512: 1.09, 1024: 1.046
        (0.2, 4096, 1024),
        (0.2, 600, 512),  # the model takes no more
        (0.2, 100, 128),
    ],
)
def test_chunk_is_the_last_that_pays(fixed_s, longest, chosen):
    asked = []

    def seconds(tokens: int) -> float:
        asked.append(tokens)
        return (fixed_s + tokens / 1000) / 10

    assert saturation_tokens(seconds, longest) == chosen
    assert all(tokens <= longest for tokens in asked)


def test_a_slow_machine_is_asked_once_and_briefly():
    asked = []

    def seconds(tokens: int) -> float:
        asked.append(tokens)
        return tokens / 100

    assert saturation_tokens(seconds, 4096) == CHUNKS[0]
    assert asked == [16]


def test_a_network_is_measured_in_a_pool_of_its_own_with_its_threads_left_alone():
    config = tiny_config()
    decoder = build_decoder(config, random_weights(config).items(), torch.float32)
    threads = torch.get_num_threads()
    assert measure_saturation(decoder, 16, 1) in CHUNKS
    assert torch.get_num_threads() == threads
