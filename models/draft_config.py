"""What a draft head's file says about its network: `DraftHeadConfig`, and the tensors that it calls for. No torch.

A draft head is one decoder layer that guesses tokens ahead of its target. Two published layouts are known:

    eagle    EAGLE-1: fc joins [embedding ; feature] to the width of the layer, which has no norm at its entrance
    eagle3   EAGLE-3: fc joins the features, and the layer reads [normed embedding ; normed feature], of twice the width

Ours is eagle with norms before fc (as HASS has them) and before the layer, and with a reduced vocabulary as in eagle3.
A file need not have `lm_head.weight`: then rows of the target's serve. Names and configs are those of SafeAILab/EAGLE
and of vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core.errors import ModelFileError
from .config import ModelConfig, config_from_hf
from .config_fields import Fields
from .weight_shapes import Shape

FINAL_NORM = -1  # as a target layer: what its last norm gives
EAGLE, EAGLE3 = "eagle", "eagle3"

_LAYER = {EAGLE: "layers.0.", EAGLE3: "midlayer."}
# What our heads have beyond EAGLE-1's, each [hidden_size].
OUR_NORMS = ("embedding_layernorm.weight", "hidden_states_layernorm.weight", "layers.0.input_layernorm.weight")


@dataclass(frozen=True, slots=True)
class DraftHeadConfig:
    """`layer`: the one layer, with the target's vocabulary. `target_layers`: the features, side by side in this order:
    the target's hidden states after so many of its layers (0: the embedding), or FINAL_NORM.

    `norm_before_residual`: the residual is what `hidden_norm` gives, not what it reads.
    """

    layout: str
    layer: ModelConfig
    draft_vocab_size: int
    target_layers: tuple[int, ...]
    norm_before_residual: bool = False

    @property
    def feature_size(self) -> int:
        """Width of a token's features, all of them."""
        return len(self.target_layers) * self.layer.hidden_size

    def name(self, part: str) -> str:
        """The tensor's name of a part of the layer, as `self_attn.q_proj.weight`."""
        return _LAYER[self.layout] + part


def layout_of(names: Collection[str]) -> str:
    """The layout of a file with these tensors."""
    return EAGLE3 if any(name.endswith(".hidden_norm.weight") for name in names) else EAGLE


def draft_config(
    values: Mapping[str, Any], names: Collection[str], target: ModelConfig, source: str = "config.json"
) -> DraftHeadConfig:
    """The config of a head for `target`, out of its parsed config.json and its file's tensor names.

    Raises ModelFileError naming the field, also where the head is not made for a target of these sizes.
    """
    fields, layout = Fields(values, source), layout_of(names)
    layer = config_from_hf(values, source)
    size = fields.integer("draft_vocab_size", layer.vocab_size, high=layer.vocab_size)
    problem = None
    if layer.num_layers != 1:
        problem = f"num_hidden_layers is {layer.num_layers}; draft heads have one layer"
    elif layer.hidden_size != target.hidden_size:
        problem = f"hidden_size is {layer.hidden_size}, the target's is {target.hidden_size}"
    elif layer.vocab_size != target.vocab_size:
        problem = f"vocab_size is {layer.vocab_size}, the target's is {target.vocab_size}"
    if problem:
        raise ModelFileError(f"{source}: {problem}")
    before = fields.flag("norm_before_residual")
    return DraftHeadConfig(layout, layer, size, _target_layers(fields, layout, target), before)


def _target_layers(fields: Fields, layout: str, target: ModelConfig) -> tuple[int, ...]:
    """As the file says, else what the papers take."""
    if layout == EAGLE:
        return (FINAL_NORM,)
    group = fields.group("eagle_config") or fields
    ids = group.get("eagle_aux_hidden_state_layer_ids")
    if ids is None:
        return 2, target.num_layers // 2, target.num_layers - 3
    if not isinstance(ids, list) or not 1 <= len(ids) <= 16 or not all(type(i) is int for i in ids):
        raise group.error("eagle_aux_hidden_state_layer_ids", "expected a list of 1 to 16 layers")
    if not all(FINAL_NORM <= i <= target.num_layers for i in ids):
        raise group.error("eagle_aux_hidden_state_layer_ids", f"the target has {target.num_layers} layers")
    return tuple(ids)


def config_values(config: DraftHeadConfig) -> dict[str, Any]:
    """`draft_config` reads the same config from these values. Only for layers of the Llama family."""
    layer = config.layer
    return {
        "architectures": ["LlamaForCausalLMEagle3" if config.layout == EAGLE3 else "LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "rms_norm_eps": layer.rms_norm_eps,
        "rope_theta": layer.rope_theta,
        "max_position_embeddings": layer.max_position,
        "vocab_size": layer.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "norm_before_residual": config.norm_before_residual,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(config.target_layers)},
    }


def head_config(target: ModelConfig, draft_vocab_size: int, inner: int) -> DraftHeadConfig:
    """A head of ours for `target`: its layer has the target's heads and an MLP of width `inner`."""
    layer = replace(
        target,
        architecture="llama",
        num_layers=1,
        intermediate_size=inner,
        window_layers=(False,),
        rope_layers=(True,),
        sliding_window=None,
        tie_word_embeddings=False,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        eos_token_ids=(),
        bos_token_id=None,
    )
    return DraftHeadConfig(EAGLE, layer, draft_vocab_size, (FINAL_NORM,))


def draft_shapes(config: DraftHeadConfig, names: Collection[str]) -> dict[str, Shape]:
    """The tensors that a file must have that has `names`; optional ones are expected where they are in it."""
    layer, hidden = config.layer, config.layer.hidden_size
    is_eagle3 = config.layout == EAGLE3
    shapes = {config.name(part): shape for part, shape in _layer_shapes(config).items()}
    shapes["fc.weight"] = (hidden, config.feature_size if is_eagle3 else 2 * hidden)
    if is_eagle3:
        shapes["norm.weight"] = (hidden,)
    optional: dict[str, Shape] = {
        "fc.bias": (hidden,),
        "embed_tokens.weight": (layer.vocab_size, hidden),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        "d2t": (config.draft_vocab_size,),
        "t2d": (layer.vocab_size,),
    }
    if not is_eagle3:
        optional |= dict.fromkeys(OUR_NORMS, (hidden,))
    reduced = ("d2t",) if config.draft_vocab_size < layer.vocab_size else ()
    return shapes | {name: shape for name, shape in optional.items() if name in names or name in reduced}


def _layer_shapes(config: DraftHeadConfig) -> dict[str, Shape]:
    """Of the layer's own parts."""
    layer, hidden, inner = config.layer, config.layer.hidden_size, config.layer.intermediate_size
    q_rows, kv_rows = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    width = 2 * hidden if config.layout == EAGLE3 else hidden
    shapes: dict[str, Shape] = {
        "self_attn.q_proj.weight": (q_rows, width),
        "self_attn.k_proj.weight": (kv_rows, width),
        "self_attn.v_proj.weight": (kv_rows, width),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.layout == EAGLE3:
        shapes |= {"input_layernorm.weight": (hidden,), "hidden_norm.weight": (hidden,)}
    return shapes
