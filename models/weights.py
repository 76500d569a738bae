"""From named tensors to a network, layer by layer (cast, fuse, pack), so that a model is never in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..kernels.linear.op import Linear
from .config import ModelConfig
from .decoder import DecoderWeights, LayerWeights
from .weight_shapes import check_shapes, weight_shapes

Progress = Callable[[int, int], None]  # (tensors done, tensors in all)


def load_weights(
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> DecoderWeights:
    """Weights of `config` out of `tensors` (canonical names, any order), in `dtype`.

    A layer is fused as soon as all its tensors are there. Raises ModelFileError for a missing, unknown or misshapen
    tensor.
    """
    expected = weight_shapes(config)
    names = [name for name in expected if name.startswith("model.layers.0.")]
    suffixes = [name.removeprefix("model.layers.0.") for name in names]
    found: dict[str, tuple[int, ...]] = {}
    pending: dict[str, torch.Tensor] = {}
    layers: dict[int, LayerWeights] = {}
    for name, tensor in tensors:
        found[name] = tuple(tensor.shape)
        if found[name] != expected.get(name):
            check_shapes({name: expected[name]} if name in expected else {}, {name: found[name]}, "weights")
        pending[name] = tensor.to(dtype)
        index = _layer_index(name)
        if index is not None and all(f"model.layers.{index}.{suffix}" in pending for suffix in suffixes):
            layers[index] = _fuse_layer(config, {s: pending.pop(f"model.layers.{index}.{s}") for s in suffixes})
        if progress is not None:
            progress(len(found), len(expected))
    check_shapes(expected, found, "weights")
    return _assemble(config, pending, layers)


def _layer_index(name: str) -> int | None:
    parts = name.split(".", 3)
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def _assemble(config: ModelConfig, rest: dict[str, torch.Tensor], layers: dict[int, LayerWeights]) -> DecoderWeights:
    embedding = rest["model.embed_tokens.weight"]
    head = embedding if config.tie_word_embeddings else rest["lm_head.weight"]
    ordered = tuple(layers[index] for index in range(config.num_layers))
    return DecoderWeights(embedding.contiguous(), ordered, rest["model.norm.weight"], Linear(head))


def _fuse_layer(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> LayerWeights:
    """One layer from its tensors, named as behind "model.layers.N."."""
    norms = None
    if config.qk_norm:
        query, key = tensors["self_attn.q_norm.weight"], tensors["self_attn.k_norm.weight"]
        norms = torch.cat((query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)))
    return LayerWeights(
        attention_norm=tensors["input_layernorm.weight"],
        qkv=_fuse(tensors, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=_fuse(tensors, "self_attn.o_proj"),
        mlp_norm=tensors["post_attention_layernorm.weight"],
        gate_up=_fuse(tensors, "mlp.gate_proj", "mlp.up_proj"),
        down=_fuse(tensors, "mlp.down_proj"),
        qk_norm=norms,
    )


def _fuse(tensors: dict[str, torch.Tensor], *names: str) -> Linear:
    """One projection whose output is that of `names` side by side."""
    weight = torch.cat([tensors[f"{name}.weight"] for name in names])
    biases = [tensors[f"{name}.bias"] for name in names if f"{name}.bias" in tensors]
    return Linear(weight, torch.cat(biases) if biases else None)
