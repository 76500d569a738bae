"""Rotary frequencies against transformers, for each kind of scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock.models.config import config_from_hf
from penstock.models.rope import rope_frequencies

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {"short_factor": [1 + 0.1 * i for i in range(32)], "long_factor": [2 + 0.5 * i for i in range(32)]}

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, **LLAMA3},
    {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "high_freq_factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 20, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048, "attention_factor": 1.7},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.2,
        "mscale_all_dim": 0.8,
    },
    {"rope_type": "longrope", "original_max_position_embeddings": 4096, **LONG},
    {"rope_type": "longrope", "original_max_position_embeddings": 4096, "factor": 2.5, **LONG},
    {"rope_type": "longrope", "original_max_position_embeddings": 4096, "attention_factor": 1.3, **LONG},
]


def both(scaling: dict[str, Any], max_context: int | None) -> tuple[tuple[torch.Tensor, float], ...]:
    """(ours, transformers') for a Llama with head_dim 64 and 16384 positions."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )
    ours = rope_frequencies(config_from_hf(theirs.to_dict()), max_context)
    return ours, ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, torch.device("cpu"), seq_len=max_context)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
@pytest.mark.parametrize("max_context", [None, 3000, 16384, 40000])
def test_frequencies_agree_with_transformers(scaling: dict[str, Any], max_context: int | None) -> None:
    (ours, our_gain), (theirs, their_gain) = both(scaling, max_context)
    assert ours.dtype == torch.float32
    assert ours.shape == (32,)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert our_gain == pytest.approx(their_gain, rel=1e-12)


def test_frequencies_without_scaling_agree_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4)
    inv_freq, gain = rope_frequencies(config_from_hf(theirs.to_dict()))
    assert torch.equal(inv_freq, LlamaRotaryEmbedding(theirs).inv_freq)
    assert gain == 1.0


def test_dynamic_scaling_changes_nothing_within_the_trained_length() -> None:
    plain, _ = both({"rope_type": "linear", "factor": 1.0}, None)
    dynamic, _ = both({"rope_type": "dynamic", "factor": 4.0}, 16384)
    torch.testing.assert_close(dynamic[0], plain[0])
