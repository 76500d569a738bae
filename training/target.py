"""The target of a draft head, as training needs it: its network in torch and the two matrices at its ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.errors import ConfigError
from ..engine.torch_engine import build_decoder
from ..models.checkpoint import open_checkpoint
from ..models.config import ModelConfig
from ..models.decoder import Decoder

_ENDS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """embedding and lm_head [vocab_size, hidden_size]: the same tensor where they are tied. identity: its files'."""

    config: ModelConfig
    decoder: Decoder
    embedding: torch.Tensor
    lm_head: torch.Tensor
    identity: str


def load_target(path: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Target:
    """The model at `path` on `device`. Raises ModelFileError."""
    checkpoint = open_checkpoint(path)
    ends: dict[str, torch.Tensor] = {}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint.tensors():
            placed = tensor.to(device, dtype)
            if name in _ENDS:
                ends[name] = placed
            yield name, placed

    decoder = build_decoder(checkpoint.config, tensors(), dtype)
    embedding = ends[_ENDS[0]]
    return Target(checkpoint.config, decoder, embedding, ends.get(_ENDS[1], embedding), checkpoint.identity)


def resolve_device(name: str) -> torch.device:
    """The device that `name` stands for; "auto" is CUDA where there is one. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here")
    return torch.device(name)
