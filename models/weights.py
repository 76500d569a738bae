"""From named tensors to a network, layer by layer (cast, fuse, pack), so that a model is never in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..core.errors import ModelFileError
from ..kernels.linear.op import Linear
from ..kernels.quant_linear.grouped import GROUP, GroupedWeight, expand, group, joined
from ..kernels.quant_linear.op import QuantEmbedding, QuantLinear
from .config import ModelConfig
from .decoder import DecoderWeights, Embedding, LayerWeights, Projection
from .weight_shapes import check_shapes, weight_shapes

Progress = Callable[[int, int], None]  # (tensors done, tensors in all)
Weight = torch.Tensor | GroupedWeight


def load_weights(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Weight]],
    dtype: torch.dtype,
    progress: Progress | None = None,
    grouped: bool = False,
) -> DecoderWeights:
    """Weights of `config` out of `tensors` (canonical names, any order), in `dtype`.

    With `grouped` the matrices become grouped weights: those that are so already stay as they are, others are rounded
    to 8 bits; `dtype` is then that of everything else. A layer is fused as soon as all its tensors are there. Raises
    ModelFileError for a missing, unknown or misshapen tensor, and for a matrix that cannot be cut into groups.
    """
    expected = weight_shapes(config)
    names = [name for name in expected if name.startswith("model.layers.0.")]
    suffixes = [name.removeprefix("model.layers.0.") for name in names]
    project = _grouped_projection if grouped else _projection
    found: dict[str, tuple[int, ...]] = {}
    pending: dict[str, Weight] = {}
    layers: dict[int, LayerWeights] = {}
    for name, tensor in tensors:
        found[name] = tuple(tensor.shape)
        if found[name] != expected.get(name):
            check_shapes({name: expected[name]} if name in expected else {}, {name: found[name]}, "weights")
        pending[name] = _prepared(tensor, dtype, grouped)
        index = _layer_index(name)
        if index is not None and all(f"model.layers.{index}.{suffix}" in pending for suffix in suffixes):
            parts = {s: pending.pop(f"model.layers.{index}.{s}") for s in suffixes}
            layers[index] = _fuse_layer(config, parts, project)
        if progress is not None:
            progress(len(found), len(expected))
    check_shapes(expected, found, "weights")
    return _assemble(config, pending, layers, grouped)


Project = Callable[[list[Weight], list[torch.Tensor]], Projection]


def _projection(weights: list[Weight], biases: list[torch.Tensor]) -> Projection:
    return Linear(torch.cat(list(map(_plain, weights))), torch.cat(biases) if biases else None)


def _grouped_projection(weights: list[Weight], biases: list[torch.Tensor]) -> Projection:
    return QuantLinear(joined(list(map(_as_grouped, weights))), torch.cat(biases) if biases else None)


def _as_grouped(weight: Weight) -> GroupedWeight:
    return weight if isinstance(weight, GroupedWeight) else group(weight)


def _plain(weight: Weight) -> torch.Tensor:
    return expand(weight) if isinstance(weight, GroupedWeight) else weight


def _prepared(weight: Weight, dtype: torch.dtype, grouped: bool) -> Weight:
    if isinstance(weight, GroupedWeight):
        return weight if grouped else expand(weight).to(dtype)
    if grouped and weight.dim() == 2:
        if weight.shape[1] % GROUP:
            raise ModelFileError(f"a matrix of {weight.shape[1]} columns cannot be cut into groups of {GROUP}")
        return group(weight)
    return weight.to(dtype)


def _layer_index(name: str) -> int | None:
    parts = name.split(".", 3)
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def _assemble(
    config: ModelConfig, rest: dict[str, Weight], layers: dict[int, LayerWeights], grouped: bool
) -> DecoderWeights:
    table = rest["model.embed_tokens.weight"]
    matrix = table if config.tie_word_embeddings else rest["lm_head.weight"]
    norm = _plain(rest["model.norm.weight"])
    ordered = tuple(layers[index] for index in range(config.num_layers))
    if not grouped:
        return DecoderWeights(_plain(table).contiguous(), ordered, norm, Linear(_plain(matrix)))
    head = QuantLinear(_as_grouped(matrix))
    rows = head if config.tie_word_embeddings else QuantLinear(_as_grouped(table))
    embedding: Embedding = QuantEmbedding(rows)
    return DecoderWeights(embedding, ordered, norm, head)


def _fuse_layer(config: ModelConfig, tensors: dict[str, Weight], project: Project) -> LayerWeights:
    """One layer from its tensors, named as behind "model.layers.N."."""
    norms = None
    if config.qk_norm:
        query, key = _plain(tensors["self_attn.q_norm.weight"]), _plain(tensors["self_attn.k_norm.weight"])
        norms = torch.cat((query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)))

    def fuse(*names: str) -> Projection:
        """One projection whose output is that of `names` side by side."""
        biases = [_plain(tensors[f"{name}.bias"]) for name in names if f"{name}.bias" in tensors]
        return project([tensors[f"{name}.weight"] for name in names], biases)

    return LayerWeights(
        attention_norm=_plain(tensors["input_layernorm.weight"]),
        qkv=fuse("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=fuse("self_attn.o_proj"),
        mlp_norm=_plain(tensors["post_attention_layernorm.weight"]),
        gate_up=fuse("mlp.gate_proj", "mlp.up_proj"),
        down=fuse("mlp.down_proj"),
        qk_norm=norms,
    )
