"""Draft heads with random weights, in each layout."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from ..models.config import ModelConfig
from ..models.decoder import Embedding
from ..models.draft_config import EAGLE, EAGLE3, OUR_NORMS, DraftHeadConfig, draft_shapes, head_config
from ..models.draft_head import DraftHead

LAYOUTS = ("ours", "eagle", "eagle3")
NUM_DRAFTED = 100


def random_head(
    layout: str,
    target: ModelConfig,
    embedding: Embedding | None = None,
    lm_head: torch.Tensor | None = None,
    seed: int = 0,
) -> DraftHead:
    """A head for a target of this config and with these ends, by default random ones.

    Ours and eagle3 draft NUM_DRAFTED tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    config, names = _config(layout, target)
    weights = {
        name: 1 + draw(*shape) if len(shape) == 1 else draw(*shape)
        for name, shape in draft_shapes(config, names).items()
        if name != "d2t"
    }
    size, width = target.vocab_size, target.hidden_size
    draft_ids = torch.arange(config.draft_vocab_size) * (size // config.draft_vocab_size)
    matrix = draw(size, width) if lm_head is None else lm_head
    ends = draw(size, width) if embedding is None else embedding
    return DraftHead(config, weights, ends, matrix[draft_ids], draft_ids)


def _config(layout: str, target: ModelConfig) -> tuple[DraftHeadConfig, Collection[str]]:
    ours = head_config(target, NUM_DRAFTED, 96)
    match layout:
        case "ours":
            return ours, OUR_NORMS
        case "eagle":
            return DraftHeadConfig(EAGLE, ours.layer, target.vocab_size, ours.target_layers), ("fc.bias",)
        case _:
            return DraftHeadConfig(EAGLE3, ours.layer, NUM_DRAFTED, (0, 1, 2)), ()
