"""A GGUF file as a checkpoint: canonical names, rows in Hugging Face order, quantised weights as float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..core.errors import ModelFileError
from ..kernels.quant_linear.grouped import GroupedWeight
from .config import ModelConfig, RopeScaling, config_from_gguf
from .dequantize import dequantize
from .gguf import GgufFile, read_gguf
from .grouped_gguf import GROUPED_FORMATS, grouped
from .weight_identity import WeightFile, weight_identity
from .weight_shapes import check_shapes, weight_shapes

_ROPE_DIVISORS = "rope_freqs.weight"
# llama.cpp's converter reorders the query and key rows of these, so that a rotated pair is two neighbours.
_PAIRED_ARCHITECTURES = ("llama", "smollm3")
_PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GgufCheckpoint:
    """Opening checks the whole header against the config; weights are decoded one at a time by `tensors`."""

    def __init__(self, path: Path) -> None:
        self._file = read_gguf(path)
        shapes = {name: info.shape for name, info in self._file.tensors.items()}
        config = config_from_gguf(self._file.metadata, shapes, path.name)
        self.config = _with_rope_divisors(config, self._file)
        self._names = {gguf_name(name): name for name in weight_shapes(self.config)}
        expected = {gguf_name(name): shape for name, shape in weight_shapes(self.config).items()}
        shapes.pop(_ROPE_DIVISORS, None)
        check_shapes(expected, shapes, path.name)
        offsets = [info.offset for info in self._file.tensors.values()]
        self.identity = weight_identity(self.config, [WeightFile(path, self._file.header_bytes, offsets)])

    @property
    def is_grouped(self) -> bool:
        """Most of the bytes are."""
        sizes = {True: 0, False: 0}
        for info in self._file.tensors.values():
            sizes[info.format.name in GROUPED_FORMATS] += info.num_bytes
        return sizes[True] > sizes[False]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight once, under its canonical name. The tensors are copies: the file stays untouched."""
        for stored, name in self._names.items():
            yield name, _in_canonical_rows(_load(self._file, stored), name, self.config)

    def grouped_tensors(self) -> Iterator[tuple[str, torch.Tensor | GroupedWeight]]:
        """The same; matrices that are stored in groups of 32 stay so."""
        for stored, name in self._names.items():
            info = self._file.tensors[stored]
            weight = grouped(self._file.raw(stored), info.format.name, info.shape)
            if weight is None:
                yield name, _in_canonical_rows(_load(self._file, stored), name, self.config)
            else:
                order = torch.arange(info.shape[0]).unsqueeze(1)
                yield name, weight.rows(_in_canonical_rows(order, name, self.config).flatten().numpy())


def gguf_name(name: str) -> str:
    """The GGUF name of a canonical weight: "model.layers.3.self_attn.q_proj.bias" is "blk.3.attn_q.bias"."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    index, rest = name.removeprefix("model.layers.").split(".", 1)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{_LAYER_NAMES[module]}.{kind}"


def _load(file: GgufFile, name: str) -> torch.Tensor:
    info = file.tensors[name]
    dtype = _PLAIN_DTYPES.get(info.format.name)
    if dtype is None:
        return torch.from_numpy(dequantize(file.raw(name), info.format)).view(info.shape)
    return torch.from_numpy(file.raw(name).copy()).view(dtype).view(info.shape)


def _in_canonical_rows(weight: torch.Tensor, name: str, config: ModelConfig) -> torch.Tensor:
    """Queries and keys of the paired architectures back to Hugging Face's order: first halves, then second halves."""
    module = name.rsplit(".", 2)[-2]
    if config.architecture not in _PAIRED_ARCHITECTURES or module not in ("q_proj", "k_proj"):
        return weight
    num_heads = config.num_heads if module == "q_proj" else config.num_kv_heads
    pairs = weight.view(num_heads, config.head_dim // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _with_rope_divisors(config: ModelConfig, file: GgufFile) -> ModelConfig:
    """Llama 3's frequency scaling is stored as the divisor of each frequency: LongRoPE's form with one set."""
    info = file.tensors.get(_ROPE_DIVISORS)
    if info is None:
        return config
    source = f"{file.path.name}: tensor {_ROPE_DIVISORS}"
    if info.shape != (config.head_dim // 2,) or info.format.name != "F32":
        problem = f"is {info.format.name} {list(info.shape)}, expected F32 [{config.head_dim // 2}]"
        raise ModelFileError(f"{source} {problem}")
    if config.rope_scaling.kind != "none":
        raise ModelFileError(f"{source} and rope.scaling.type {config.rope_scaling.kind} cannot both apply")
    divisors = tuple(float(v) for v in dequantize(file.raw(_ROPE_DIVISORS), info.format))
    if not all(0 < divisor < 1e30 for divisor in divisors):
        raise ModelFileError(f"{source} has a value that is not a finite number above 0")
    scaling = RopeScaling(
        kind="longrope",
        original_max_position=config.max_position,
        attention_factor=1.0,
        short_factor=divisors,
        long_factor=divisors,
    )
    return replace(config, rope_scaling=scaling)
