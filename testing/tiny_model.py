"""Small networks with random weights: every architecture's shape, none of its size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..models.config import ModelConfig
from ..models.weight_shapes import weight_shapes

_FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 24, "window_layers": (True, True, True)},
    "qwen2": {"attention_bias": True, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 24},
    "smollm3": {"rope_layers": (True, True, False), "tie_word_embeddings": True},
}


def tiny_config(architecture: str = "llama", **changes: object) -> ModelConfig:
    """Three layers of width 72 with 6 query and 2 KV heads; `changes` are fields of ModelConfig."""
    config = ModelConfig(
        architecture=architecture,
        vocab_size=320,
        hidden_size=72,
        intermediate_size=96,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        max_position=512,
        window_layers=(False,) * 3,
        rope_layers=(True,) * 3,
        eos_token_ids=(0,),
    )
    return replace(config, **(_FAMILIES[architecture] | changes))  # type: ignore[arg-type]  # fields by name


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """float32 weights by canonical name."""
    return dict(draw_weights(config, torch.Generator().manual_seed(seed)))


def draw_weights(
    config: ModelConfig, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same one at a time, on the generator's device: scaled so that logits spread over several units and attention
    is not uniform.
    """

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
        if name.endswith("norm.weight"):
            return 1 + 0.2 * values
        if name.endswith("embed_tokens.weight"):
            return values * 0.5
        return values * (0.2 if len(shape) == 1 else 2 / math.sqrt(shape[-1]))

    return ((name, draw(name, shape)) for name, shape in weight_shapes(config).items())
