"""The weights that a config calls for: their canonical Hugging Face names and shapes. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.errors import ModelFileError
from .config import ModelConfig
from .config_fields import printable

Shape = tuple[int, ...]


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every weight of the network in file order; matrices are (out, in). A tied head is left out."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    layer = _layer_shapes(config)
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    shapes |= _linear("self_attn.q_proj", q_rows, hidden, config.attention_bias)
    shapes |= _linear("self_attn.k_proj", kv_rows, hidden, config.attention_bias)
    shapes |= _linear("self_attn.v_proj", kv_rows, hidden, config.attention_bias)
    shapes |= _linear("self_attn.o_proj", hidden, q_rows, config.output_bias)
    shapes |= _linear("mlp.gate_proj", inner, hidden, config.mlp_bias)
    shapes |= _linear("mlp.up_proj", inner, hidden, config.mlp_bias)
    shapes |= _linear("mlp.down_proj", hidden, inner, config.mlp_bias)
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    return shapes


def _linear(name: str, rows: int, columns: int, has_bias: bool) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if has_bias else weight


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str) -> None:
    """Raise ModelFileError unless `found` has exactly the expected names and shapes.

    A weight we do not know is refused too: leaving one out would give another network than the file's.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise ModelFileError(f"{source}: tensor {missing[0]} is missing{_others(missing)}")
    for name, shape in expected.items():
        if found[name] != shape:
            problem = f"tensor {name} has shape {list(found[name])}, the config calls for {list(shape)}"
            raise ModelFileError(f"{source}: {problem}")
    unknown = [name for name in found if name not in expected]
    if unknown:
        problem = f"tensor {printable(unknown[0])} is not part of this architecture{_others(unknown)}"
        raise ModelFileError(f"{source}: {problem}")


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
