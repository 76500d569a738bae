"""Draft heads on disk: a .safetensors file, with its config in a config.json beside it or in its own metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.errors import ModelFileError
from .config import ModelConfig
from .config_fields import shown
from .decoder import Embedding
from .draft_config import EAGLE3, DraftHeadConfig, config_values, draft_config, draft_shapes, layout_of
from .draft_head import DraftHead
from .safetensors_folder import read_json
from .weight_shapes import check_shapes

_FLOATS = ("F32", "F16", "BF16")
_DTYPES = {"d2t": ("I64", "I32"), "t2d": ("BOOL", "U8", "I64")}
_IDLE = ("t2d",)  # says what d2t says


def load_draft_head(
    path: Path, target: ModelConfig, embedding: Embedding, lm_head: Embedding, dtype: torch.dtype = torch.float32
) -> DraftHead:
    """The head in `path` (a .safetensors file, or a folder with one) for a target of the config `target`.

    embedding, lm_head: the target's matrices [vocab_size, hidden_size], or what gives their rows; a head that brings
    its own uses that. Weights become `dtype`. Raises ModelFileError naming the file, and the tensor or the field.
    """
    file = _only_file(path)
    try:
        with safe_open(file, framework="pt") as reader:
            config, tensors = _read(reader, file, target)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{file.name}: {error}") from error
    draft_ids = _draft_ids(config, tensors.pop("d2t", None), file.name)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    own_embedding, own_head = tensors.pop("embed_tokens.weight", None), tensors.pop("lm_head.weight", None)
    rows = lm_head.index_select(0, draft_ids).to(dtype) if own_head is None else own_head
    return DraftHead(config, tensors, embedding if own_embedding is None else own_embedding, rows, draft_ids)


def save_draft_head(
    head: DraftHead, path: Path, facts: Mapping[str, str], *, dtype: torch.dtype = torch.bfloat16, with_lm_head: bool
) -> None:
    """Write the head to one file, `facts` and the config in its metadata.

    Without its lm_head, rows of the target's serve when it is loaded. The target's embedding is never written.
    """
    config = head.config
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in head.weights.items()}
    if with_lm_head:
        tensors["lm_head.weight"] = head.lm_head.detach().to("cpu", dtype).contiguous()
    draft_ids = head.draft_ids.cpu()
    if config.draft_vocab_size < config.layer.vocab_size:
        is_drafted = torch.zeros(config.layer.vocab_size, dtype=torch.bool)
        is_drafted[draft_ids] = True
        tensors |= {"d2t": draft_ids - torch.arange(len(draft_ids)), "t2d": is_drafted}
    save_file(tensors, path, {**facts, "config": json.dumps(config_values(config))})


def read_facts(path: Path) -> dict[str, str]:
    """The metadata of a head's file: its config and what `save_draft_head` was told. Raises ModelFileError."""
    file = _only_file(path)
    try:
        with safe_open(file, framework="pt") as reader:
            return dict(reader.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{file.name}: {error}") from error


def _only_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise ModelFileError(f"{path.name}: draft heads are read from .safetensors files, never from pickles")
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelFileError(f"{path.name}: holds {len(files)} .safetensors files, a draft head is one")
    return files[0]


def _read(reader: Any, file: Path, target: ModelConfig) -> tuple[DraftHeadConfig, dict[str, torch.Tensor]]:
    """The config, and every tensor that carries something, by its name in our layouts. Shapes are checked first."""
    names: list[str] = reader.keys()
    layout = layout_of(names)
    stored = {_canonical(name, layout): name for name in names}
    values, source = _config_values(reader, file)
    config = draft_config(values, stored, target, source)
    slices = {name: reader.get_slice(stored[name]) for name in stored}
    check_shapes(draft_shapes(config, stored), {n: tuple(part.get_shape()) for n, part in slices.items()}, file.name)
    for name, part in slices.items():
        dtype, allowed = part.get_dtype(), _DTYPES.get(name, _FLOATS)
        if dtype not in allowed:
            raise ModelFileError(f"{file.name}: tensor {name} is {dtype}, expected {' or '.join(allowed)}")
    return config, {name: reader.get_tensor(stored[name]) for name in stored if name not in _IDLE}


def _canonical(name: str, layout: str) -> str:
    """EAGLE-3 heads name their layer in two ways."""
    return name.replace("layers.0.", "midlayer.", 1) if layout == EAGLE3 else name


def _config_values(reader: Any, file: Path) -> tuple[dict[str, Any], str]:
    """The parsed config and where it is from."""
    beside = file.parent / "config.json"
    if beside.is_file():
        return read_json(beside), beside.name
    source = f"{file.name}: config"
    try:
        values = json.loads((reader.metadata() or {}).get("config", "null"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{source}: not valid JSON") from error
    if not isinstance(values, dict):
        raise ModelFileError(f"{source} is {shown(values)}: no config.json lies beside the file and none is in it")
    return values, source


def _draft_ids(config: DraftHeadConfig, offsets: torch.Tensor | None, source: str) -> torch.Tensor:
    """The target's ids of the draft vocabulary: d2t holds their distances from its own."""
    ids = torch.arange(config.draft_vocab_size)
    if offsets is None:
        return ids
    ids = ids + offsets.long()
    if int(ids.min()) < 0 or int(ids.max()) >= config.layer.vocab_size or len(set(ids.tolist())) < len(ids):
        raise ModelFileError(f"{source}: tensor d2t leads beyond the vocabulary, or twice to one token")
    return ids
