"""What a model file says about its network: `ModelConfig`, the same for GGUF and Hugging Face folders.

`config_from_hf` reads a parsed config.json, `config_from_gguf` reads GGUF metadata. Both raise ModelFileError that
names the file, the field and its value; neither imports torch, so the router can use them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import ModelFileError
from .config_fields import Fields, shown

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
ROPE_KINDS = ("none", "linear", "dynamic", "llama3", "yarn", "longrope")

# Far above any real model and low enough that a broken file cannot make us allocate for it.
MAX_LAYERS = 4096
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 24
MAX_POSITIONS = 1 << 30

_HF_ROPE_KINDS = {"default": "none", "su": "longrope", **{kind: kind for kind in ROPE_KINDS}}
_HF_ROPE_THETA = {"smollm3": 2_000_000.0}  # what transformers assumes when the file is silent
_NO_ROPE_INTERVAL = 4  # SmolLM3's published models, and GGUF has no key for it
_GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
# Tokens that end a turn or a text in these families. GGUF names at most two of them by id.
_END_TOKENS = frozenset(("</s>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"))
_CONTROL_TOKEN = 3


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched. Fields that `kind` does not use keep their defaults.

    `factor` and `original_max_position` are resolved when the file is read: they never have to be derived later.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position: int = 0  # llama3, yarn, longrope: positions seen in pre-training
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope; None = derived from `factor`
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope [head_dim/2]
    long_factor: tuple[float, ...] = ()  # longrope [head_dim/2]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only network.

    `window_layers[i]` says that in layer i a token sees only the last `sliding_window` tokens, itself included;
    `rope_layers[i]` that layer i rotates its queries and keys.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position: int
    window_layers: tuple[bool, ...]
    rope_layers: tuple[bool, ...]
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # q, k and v projections
    output_bias: bool = False  # o projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over head_dim of queries and keys, before rotation
    hidden_act: str = "silu"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


def config_from_hf(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """The config of a Hugging Face folder. `source` names the file in errors."""
    fields = Fields(values, source)
    architecture = _hf_architecture(fields)
    shape = _hf_shape(fields, architecture)
    num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    rope_layers = _hf_rope_layers(fields, architecture, num_layers)
    window = _hf_window(fields, architecture)
    theta, scaling, reach = _hf_rope(fields, architecture, shape["head_dim"])
    has_bias = architecture in ("llama", "qwen3", "smollm3") and fields.flag("attention_bias")
    config = ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        **shape,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=reach,
        rope_layers=rope_layers,
        sliding_window=window,
        window_layers=_hf_window_layers(fields, architecture, window, rope_layers),
        tie_word_embeddings=fields.flag("tie_word_embeddings", architecture == "smollm3"),
        attention_bias=has_bias or architecture == "qwen2",
        output_bias=has_bias,
        mlp_bias=architecture in ("llama", "smollm3") and fields.flag("mlp_bias"),
        qk_norm=architecture == "qwen3",
        hidden_act=fields.text("hidden_act", "silu"),
        eos_token_ids=fields.token_ids("eos_token_id", shape["vocab_size"]),
        bos_token_id=next(iter(fields.token_ids("bos_token_id", shape["vocab_size"])), None),
    )
    return _checked(config, source)


def _checked(config: ModelConfig, source: str) -> ModelConfig:
    """`config` itself, or ModelFileError where its numbers contradict each other."""
    problem = None
    if config.num_heads % config.num_kv_heads:
        problem = f"{config.num_heads} attention heads are not a multiple of {config.num_kv_heads} key/value heads"
    elif config.head_dim % 2 or config.head_dim < 4:
        problem = f"head_dim is {config.head_dim}, rotary embedding needs an even number from 4"
    elif config.rope_theta <= 1:
        problem = f"rope_theta is {config.rope_theta}, expected more than 1"
    elif config.max_position > MAX_POSITIONS:
        problem = f"the rotary scaling factor {config.rope_scaling.factor} stretches the context to no real length"
    elif config.hidden_act != "silu":
        problem = f"hidden_act is {shown(config.hidden_act)}, only 'silu' is supported"
    elif any(config.window_layers) and config.sliding_window is None:
        problem = "a layer is marked sliding_attention but no sliding_window is in force"
    if problem:
        raise ModelFileError(f"{source}: {problem}")
    return config


def _hf_architecture(fields: Fields) -> str:
    name = fields.text("model_type")
    if name not in ARCHITECTURES:
        raise fields.error("model_type", f"which is not supported; supported: {', '.join(ARCHITECTURES)}")
    if fields.get("quantization_config"):
        raise fields.error(
            "quantization_config", "quantised safetensors are not supported: use plain weights or a GGUF"
        )
    return name


def _hf_shape(fields: Fields, architecture: str) -> dict[str, int]:
    hidden_size = fields.integer("hidden_size", high=MAX_WIDTH)
    num_heads = fields.integer("num_attention_heads", high=MAX_WIDTH)
    default_head_dim = 128 if architecture == "qwen3" else hidden_size // num_heads
    return {
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCAB),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size", high=MAX_WIDTH),
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("num_key_value_heads", num_heads, high=MAX_WIDTH),
        "head_dim": fields.integer("head_dim", default_head_dim, high=MAX_WIDTH),
    }


def _hf_rope_layers(fields: Fields, architecture: str, num_layers: int) -> tuple[bool, ...]:
    """In SmolLM3's `no_rope_layers` a 1 means that the layer does rotate."""
    if architecture != "smollm3":
        return (True,) * num_layers
    interval = fields.integer("no_rope_layer_interval", _NO_ROPE_INTERVAL)
    rotates = fields.sequence("no_rope_layers", num_layers)
    if rotates is None:
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not all(entry in (0, 1) for entry in rotates):
        raise fields.error("no_rope_layers", "expected only 0 and 1")
    return tuple(bool(entry) for entry in rotates)


def _hf_window(fields: Fields, architecture: str) -> int | None:
    if architecture == "llama" or fields.get("sliding_window") is None:
        return None
    if architecture != "mistral" and not fields.flag("use_sliding_window"):
        return None
    return fields.integer("sliding_window", high=MAX_POSITIONS)


def _hf_window_layers(
    fields: Fields, architecture: str, window: int | None, rope_layers: tuple[bool, ...]
) -> tuple[bool, ...]:
    """Which layers slide: `layer_types` where the file has it, else each family's own rule."""
    num_layers = len(rope_layers)
    types = fields.sequence("layer_types", num_layers)
    if types is not None:
        if not all(kind in ("full_attention", "sliding_attention") for kind in types):
            raise fields.error("layer_types", "supported: full_attention, sliding_attention")
        slides = tuple(kind == "sliding_attention" for kind in types)
        if architecture == "mistral" and slides != (window is not None,) * num_layers:
            raise fields.error("layer_types", f"but with sliding_window {window} Mistral slides in all layers or none")
        return slides
    if window is None:
        return (False,) * num_layers
    if architecture == "mistral":
        return (True,) * num_layers
    if architecture == "smollm3":
        return tuple(not rotates for rotates in rope_layers)
    first = fields.integer("max_window_layers", 28, low=0)
    return tuple(layer >= first for layer in range(num_layers))


def _hf_rope(fields: Fields, architecture: str, head_dim: int) -> tuple[float, RopeScaling, int]:
    """Base, scaling, and positions they reach. New files say `rope_parameters`, old ones `rope_scaling`."""
    max_position = fields.integer("max_position_embeddings", high=MAX_POSITIONS)
    theta = fields.number("rope_theta", _HF_ROPE_THETA.get(architecture, 10_000.0))
    partial = fields.number("partial_rotary_factor", 1.0)
    group = fields.group("rope_parameters") or fields.group("rope_scaling")
    if group is not None:
        theta = group.number("rope_theta", theta)
        partial = group.number("partial_rotary_factor", partial)
    if partial != 1.0:
        raise ModelFileError(f"{fields.source}: partial_rotary_factor is {partial}, only 1.0 is supported")
    kind = "none" if group is None else _rope_kind(group)
    if group is None or kind == "none":
        return theta, RopeScaling(), max_position
    outer = fields.get("original_max_position_embeddings")
    original = (fields if outer is not None else group).integer(
        "original_max_position_embeddings", max_position, low=2, high=MAX_POSITIONS
    )
    scaling = _rope_scaling(group, kind, original, max_position, head_dim)
    # A YaRN file keeps the pre-training length in max_position_embeddings (Qwen's advice); the factor extends it.
    return theta, scaling, max(max_position, int(original * scaling.factor)) if kind == "yarn" else max_position


def _rope_kind(group: Fields) -> str:
    nested = [key for key, value in group.values.items() if isinstance(value, Mapping)]
    if nested:
        raise ModelFileError(f"{group.source}: rope settings per layer type ({nested[0][:40]}) are not supported")
    key = "rope_type" if group.get("rope_type") is not None else "type"
    kind = _HF_ROPE_KINDS.get(group.text(key, "default"))
    if kind is None:
        raise group.error(key, f"which is not supported; supported: default, {', '.join(ROPE_KINDS[1:])}")
    return kind


def _rope_scaling(group: Fields, kind: str, original: int, max_position: int, head_dim: int) -> RopeScaling:
    derives_factor = kind in ("yarn", "longrope")
    low, high = 1.0, 4.0
    if kind == "llama3":
        low, high = group.number("low_freq_factor"), group.number("high_freq_factor")
        if low >= high:
            raise group.error("high_freq_factor", f"expected more than low_freq_factor ({low})")
    return RopeScaling(
        kind=kind,
        factor=group.number("factor", max_position / original if derives_factor else None),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=original,
        beta_fast=group.number("beta_fast", 32.0),
        beta_slow=group.number("beta_slow", 1.0),
        attention_factor=group.optional_number("attention_factor"),
        mscale=group.optional_number("mscale"),
        mscale_all_dim=group.optional_number("mscale_all_dim"),
        truncate=group.flag("truncate", True),
        short_factor=group.numbers("short_factor", head_dim // 2) if kind == "longrope" else (),
        long_factor=group.numbers("long_factor", head_dim // 2) if kind == "longrope" else (),
    )


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None, source: str = "GGUF metadata"
) -> ModelConfig:
    """The config of a GGUF file. `shapes` (tensor name -> (out, in)) settles vocabulary size, biases and the tied head;
    without it they follow the tokenizer and the architecture's custom.
    """
    general = Fields(metadata, source)
    architecture = general.text("general.architecture")
    if architecture not in _GGUF_ARCHITECTURES:
        names = ", ".join(_GGUF_ARCHITECTURES)
        raise general.error("general.architecture", f"which is not supported; supported: {names}")
    fields = Fields(metadata, source, f"{architecture}.")
    if fields.get("expert_count"):
        raise fields.error("expert_count", "mixtures of experts are not supported")
    vocab_size = _gguf_vocab_size(fields, general, shapes)
    hidden_size = fields.integer("embedding_length", high=MAX_WIDTH)
    num_heads = fields.integer("attention.head_count", high=MAX_WIDTH)
    num_layers = fields.integer("block_count", high=MAX_LAYERS)
    max_position = fields.integer("context_length", high=MAX_POSITIONS)
    head_dim = _gguf_head_dim(fields, hidden_size // num_heads)
    window = fields.integer("attention.sliding_window", 0, low=0, high=MAX_POSITIONS) or None
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length", high=MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv", num_heads, high=MAX_WIDTH),
        head_dim=head_dim,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number("rope.freq_base", 10_000.0),
        rope_scaling=_gguf_rope_scaling(fields, max_position),
        max_position=max_position,
        sliding_window=window,
        window_layers=(window is not None,) * num_layers,
        rope_layers=tuple(architecture != "smollm3" or (i + 1) % _NO_ROPE_INTERVAL != 0 for i in range(num_layers)),
        tie_word_embeddings=shapes is not None and "output.weight" not in shapes,
        attention_bias=architecture == "qwen2" if shapes is None else "blk.0.attn_q.bias" in shapes,
        output_bias=shapes is not None and "blk.0.attn_output.bias" in shapes,
        mlp_bias=shapes is not None and "blk.0.ffn_up.bias" in shapes,
        qk_norm=architecture == "qwen3",
        eos_token_ids=_gguf_end_tokens(general, vocab_size),
        bos_token_id=next(iter(general.token_ids("tokenizer.ggml.bos_token_id", vocab_size)), None),
    )
    return _checked(config, source)


def _gguf_vocab_size(fields: Fields, general: Fields, shapes: Mapping[str, tuple[int, ...]] | None) -> int:
    """Rows of the embedding; some files pad it beyond the tokenizer, and `vocab_size` is often absent."""
    rows = (shapes or {}).get("token_embd.weight", ())
    if len(rows) == 2:
        return rows[0]
    tokens = general.get("tokenizer.ggml.tokens")
    return fields.integer("vocab_size", len(tokens) if isinstance(tokens, list) else None, high=MAX_VOCAB)


def _gguf_head_dim(fields: Fields, default: int) -> int:
    head_dim = fields.integer("attention.key_length", default, high=MAX_WIDTH)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim, high=MAX_WIDTH) != head_dim:
            raise fields.error(key, f"only the head dimension ({head_dim}) is supported")
    return head_dim


def _gguf_rope_scaling(fields: Fields, max_position: int) -> RopeScaling:
    """Llama 3's factors are a tensor of the file, not metadata; `GgufCheckpoint` adds them."""
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    kind = fields.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise fields.error("rope.scaling.type", "supported: none, linear, yarn")
    if kind == "none" or factor == 1.0:
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    extra = fields.optional_number("rope.scaling.attn_factor")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position=fields.integer(
            "rope.scaling.original_context_length", max_position, low=2, high=MAX_POSITIONS
        ),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        # GGUF's factor comes on top of the one derived from the stretch.
        attention_factor=None if extra is None else extra * (1 + 0.1 * math.log(max(factor, 1.0))),
    )


def _gguf_end_tokens(general: Fields, vocab_size: int) -> tuple[int, ...]:
    """The ids that the file names, then every control token that ends a turn in these families."""
    ids: list[int] = []
    for key in ("eos_token_id", "eot_token_id", "eom_token_id"):
        ids += general.token_ids(f"tokenizer.ggml.{key}", vocab_size)
    tokens, types = general.get("tokenizer.ggml.tokens"), general.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = enumerate(zip(tokens, types, strict=False))
        ends = [
            i
            for i, (token, kind) in pairs
            if kind == _CONTROL_TOKEN and isinstance(token, str) and token in _END_TOKENS
        ]
        ids += [i for i in ends if i < vocab_size]
    return tuple(dict.fromkeys(ids))
