"""A Hugging Face folder as a checkpoint: config.json and one or more .safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from ..core.errors import ModelFileError
from ..kernels.quant_linear.grouped import GroupedWeight
from .config import ModelConfig, config_from_hf
from .config_fields import Fields, printable, shown
from .weight_identity import WeightFile, weight_identity
from .weight_shapes import Shape, check_shapes, weight_shapes

_MAX_JSON_BYTES = 32 << 20
_MAX_SHARDS = 4096
_INDEX_NAME = "model.safetensors.index.json"
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    header_bytes: int
    shapes: dict[str, Shape]
    offsets: list[int]


class SafetensorsFolder:
    """Opening checks the JSON headers against the config; weights are read one at a time by `tensors`."""

    def __init__(self, folder: Path) -> None:
        self.config = _read_config(folder)
        self._shards = [_read_shard(path) for path in _shard_paths(folder)]
        self._expected = weight_shapes(self.config)
        check_shapes(self._expected, _used_shapes(self._shards, self.config, folder), folder.name)
        files = [WeightFile(shard.path, shard.header_bytes, shard.offsets) for shard in self._shards]
        self.identity = weight_identity(self.config, files)

    @property
    def is_grouped(self) -> bool:
        """No such file has grouped weights that are read as they are."""
        return False

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight once, in the dtype of the file, shard by shard."""
        for shard in self._shards:
            try:
                with safe_open(shard.path, framework="pt") as file:
                    for name in shard.shapes:
                        if name in self._expected:
                            yield name, file.get_tensor(name)
            except SafetensorError as error:
                raise ModelFileError(f"{shard.path.name}: {error}") from error

    def grouped_tensors(self) -> Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
        """The same."""
        yield from self.tensors()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 32 MiB."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelFileError(f"{path.name}: cannot be read: {error.strerror}") from error
    return _json_object(raw, path.name)


def _json_object(raw: bytes, source: str) -> dict[str, Any]:
    if len(raw) > _MAX_JSON_BYTES:
        raise ModelFileError(f"{source}: more than {_MAX_JSON_BYTES} bytes of JSON")
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{source}: not valid JSON ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise ModelFileError(f"{source}: expected a JSON object, found {shown(values)}")
    return values


def _read_config(folder: Path) -> ModelConfig:
    """config.json, with the end tokens that generation_config.json adds: chat models often name theirs only there."""
    config = config_from_hf(read_json(folder / "config.json"), f"{folder.name}/config.json")
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    extra = Fields(read_json(path), f"{folder.name}/{path.name}").token_ids("eos_token_id", config.vocab_size)
    return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + extra)))


def _shard_paths(folder: Path) -> list[Path]:
    """The files that the index names, or all .safetensors files of the folder."""
    index = folder / _INDEX_NAME
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    source = f"{folder.name}/{_INDEX_NAME}"
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{source}: weight_map is {shown(weight_map)}, expected an object of tensor names")
    names = set()
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFileError(
                f"{source}: weight_map names {shown(name)}, expected a .safetensors file of the folder"
            )
        names.add(name)
    if len(names) > _MAX_SHARDS:
        raise ModelFileError(f"{source}: weight_map names {len(names)} files, expected at most {_MAX_SHARDS}")
    return [folder / name for name in sorted(names)]


def _read_shard(path: Path) -> _Shard:
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 10 or length > min(size - 8, _MAX_JSON_BYTES):
                room = min(max(size - 8, 0), _MAX_JSON_BYTES)
                raise ModelFileError(f"{path.name}: header length is {length}, expected at most {room}")
            header = _json_object(stream.read(length), path.name)
    except OSError as error:
        raise ModelFileError(f"{path.name}: cannot be read: {error.strerror}") from error
    header.pop("__metadata__", None)
    start = 8 + length
    shapes: dict[str, Shape] = {}
    offsets: list[int] = []
    for name, entry in header.items():
        shapes[name], offset = _read_entry(entry, f"{path.name}: tensor {printable(name)}", size - start)
        offsets.append(start + offset)
    return _Shard(path, start, shapes, offsets)


def _read_entry(entry: object, source: str, data_bytes: int) -> tuple[Shape, int]:
    """Shape and start of one tensor; its bytes lie inside the data and are as many as dtype and shape need."""
    if not isinstance(entry, Mapping):
        raise ModelFileError(f"{source} is {shown(entry)}, expected an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ModelFileError(f"{source}: dtype is {shown(dtype)}, supported: {', '.join(_DTYPE_BYTES)}")
    if not _whole_numbers(shape) or len(shape) > 4:
        raise ModelFileError(f"{source}: shape is {shown(shape)}, expected at most 4 whole numbers")
    if not _whole_numbers(span) or len(span) != 2 or not span[0] <= span[1] <= data_bytes:
        raise ModelFileError(f"{source}: data_offsets is {shown(span)}, expected a range inside {data_bytes} bytes")
    if span[1] - span[0] != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise ModelFileError(f"{source}: data_offsets is {shown(span)}, which does not fit {dtype} {shown(shape)}")
    return tuple(shape), span[0]


def _whole_numbers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _used_shapes(shards: list[_Shard], config: ModelConfig, folder: Path) -> dict[str, Shape]:
    """All the shards' tensors but those that carry nothing: rotary tables of old files, the copy of a tied head."""
    shapes: dict[str, Shape] = {}
    for shard in shards:
        for name, shape in shard.shapes.items():
            if name in shapes:
                raise ModelFileError(f"{folder.name}: tensor {printable(name)} is in more than one file")
            shapes[name] = shape
    is_idle = {name for name in shapes if name.endswith(".rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        is_idle.add("lm_head.weight")
    return {name: shape for name, shape in shapes.items() if name not in is_idle}
