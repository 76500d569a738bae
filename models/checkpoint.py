"""Opening a model: one `Checkpoint` whatever the file format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from ..core.errors import ModelFileError
from ..kernels.quant_linear.grouped import GroupedWeight
from .config import ModelConfig
from .gguf_checkpoint import GgufCheckpoint
from .safetensors_folder import SafetensorsFolder

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint(Protocol):
    """A model's config and weights under canonical Hugging Face names.

    `identity` is a short hex digest of config and files: workers that exchange KV blocks must agree on it.
    """

    config: ModelConfig
    identity: str

    @property
    def is_grouped(self) -> bool:
        """Most of the weights are stored as grouped ones."""
        ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight once, e.g. ("model.layers.3.self_attn.q_proj.weight", [num_heads * head_dim, hidden_size]).

        On the CPU, in float32, float16 or bfloat16 as stored, quantised ones as float32. A tied "lm_head.weight" is
        absent. Raises ModelFileError.
        """
        ...

    def grouped_tensors(self) -> Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
        """The same; matrices whose format is that of grouped weights as they are stored."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .gguf file, a folder of .safetensors files with config.json, or a folder that holds one .gguf file.

    All headers are checked here, so a broken file fails before any weight is read. Raises ModelFileError.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file or folder")
    if path.suffix in _PICKLE_SUFFIXES:
        raise _pickle_error(path.name)
    if path.suffix == ".safetensors":
        raise ModelFileError(f"{path.name}: pass the folder that holds it, with its config.json")
    return GgufCheckpoint(path)


def _open_folder(folder: Path) -> Checkpoint:
    if any(folder.glob("*.safetensors")):
        return SafetensorsFolder(folder)
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return GgufCheckpoint(files[0])
    if files:
        names = ", ".join(file.name for file in files[:8])
        raise ModelFileError(f"{folder.name}: holds {len(files)} GGUF files ({names}); pass the one to load")
    pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise _pickle_error(f"{folder.name}/{pickles[0]}")
    raise ModelFileError(f"{folder.name}: holds no .safetensors and no .gguf file")


def _pickle_error(name: str) -> ModelFileError:
    problem = "pickled weights can run code and are never loaded; convert the model to safetensors or GGUF"
    return ModelFileError(f"{name}: {problem}")
