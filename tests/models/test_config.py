"""Configs from config.json values and from GGUF metadata, good and bad."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from penstock.core.errors import ModelFileError
from penstock.models.config import ModelConfig, RopeScaling, config_from_gguf, config_from_hf
from penstock.tests.models.gguf_files import tiny_metadata


def hf_values(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    values = {
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    return values | changes


def read(model_type: str = "llama", **changes: Any) -> ModelConfig:
    return config_from_hf(hf_values(model_type, **changes))


def test_llama_config_reads_shapes_and_ids() -> None:
    config = read(tie_word_embeddings=True)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (64, 32, 48)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 2, 8)
    assert (config.rms_norm_eps, config.rope_theta, config.max_position) == (1e-5, 50000.0, 128)
    assert config.eos_token_ids == (2,)
    assert config.bos_token_id == 1
    assert config.tie_word_embeddings
    assert config.rope_layers == (True,) * 8
    assert config.window_layers == (False,) * 8
    assert config.rope_scaling == RopeScaling()


@pytest.mark.parametrize(
    ("model_type", "changes", "biases"),
    [
        ("llama", {}, (False, False, False)),
        ("llama", {"attention_bias": True, "mlp_bias": True}, (True, True, True)),
        ("mistral", {"attention_bias": True}, (False, False, False)),
        ("qwen2", {}, (True, False, False)),
        ("qwen3", {}, (False, False, False)),
        ("qwen3", {"attention_bias": True}, (True, True, False)),
        ("smollm3", {"mlp_bias": True}, (False, False, True)),
    ],
)
def test_biases_follow_the_family(model_type: str, changes: dict[str, Any], biases: tuple[bool, ...]) -> None:
    config = read(model_type, **changes)
    assert (config.attention_bias, config.output_bias, config.mlp_bias) == biases


def test_qwen3_has_qk_norm_and_its_own_head_dim() -> None:
    assert read("qwen3").head_dim == 128
    assert read("qwen3", head_dim=16).head_dim == 16
    assert read("qwen3").qk_norm
    assert not read("qwen2").qk_norm


def test_missing_key_value_heads_mean_one_for_each_head() -> None:
    assert read(num_key_value_heads=None).num_kv_heads == 4


def test_silent_file_gets_the_defaults_of_its_family() -> None:
    assert read("llama", rope_theta=None).rope_theta == 10_000
    assert read("smollm3", rope_theta=None).rope_theta == 2_000_000
    assert read("smollm3").tie_word_embeddings
    assert not read("llama").tie_word_embeddings


def test_mistral_window_slides_in_every_layer() -> None:
    config = read("mistral", sliding_window=16)
    assert config.sliding_window == 16
    assert all(config.window_layers)
    assert read("mistral", sliding_window=None).window_layers == (False,) * 8


def test_qwen_window_starts_at_max_window_layers() -> None:
    config = read("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=5)
    assert config.window_layers == (False,) * 5 + (True,) * 3
    off = read("qwen2", sliding_window=16, use_sliding_window=False, max_window_layers=5)
    assert off.sliding_window is None
    assert not any(off.window_layers)


def test_layer_types_decide_which_layers_slide() -> None:
    types = ["full_attention", "sliding_attention"] * 4
    config = read("qwen3", sliding_window=16, use_sliding_window=True, layer_types=types)
    assert config.window_layers == (False, True) * 4


def test_smollm3_rotates_three_layers_of_four_unless_listed() -> None:
    assert read("smollm3").rope_layers == (True, True, True, False) * 2
    assert read("smollm3", no_rope_layer_interval=2).rope_layers == (True, False) * 4
    assert read("smollm3", no_rope_layers=[0] * 3 + [1] * 7).rope_layers == (False,) * 3 + (True,) * 5


def test_smollm3_window_slides_in_the_layers_that_do_not_rotate() -> None:
    config = read("smollm3", sliding_window=16, use_sliding_window=True)
    assert config.window_layers == (False, False, False, True) * 2


def test_eos_list_keeps_order_and_drops_ids_beyond_the_vocabulary() -> None:
    assert read(eos_token_id=[5, 2, 5, 1000]).eos_token_ids == (5, 2)
    assert read(eos_token_id=None).eos_token_ids == ()


def test_rope_scaling_and_rope_parameters_read_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = read(rope_scaling={"rope_type": "llama3", **scaling})
    new = read(rope_theta=None, rope_parameters={"rope_type": "llama3", "rope_theta": 50000.0, **scaling})
    older = read(rope_scaling={"type": "llama3", **scaling})
    assert old == new == older
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


def test_default_rope_parameters_give_no_scaling() -> None:
    config = read(rope_parameters={"rope_type": "default", "rope_theta": 123.0})
    assert config.rope_theta == 123.0
    assert config.rope_scaling == RopeScaling()


def test_yarn_extends_the_context_by_its_factor() -> None:
    config = read(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128})
    assert config.max_position == 512
    assert config.rope_scaling.original_max_position == 128


def test_yarn_factor_is_derived_when_absent() -> None:
    config = read(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 32})
    assert config.rope_scaling.factor == 4.0
    assert config.max_position == 128


def test_longrope_takes_the_original_length_from_outside() -> None:
    factors = [1.0, 2.0, 3.0, 4.0]
    config = read(
        rope_scaling={"type": "su", "short_factor": factors, "long_factor": factors},
        original_max_position_embeddings=64,
    )
    assert config.rope_scaling.kind == "longrope"
    assert config.rope_scaling.original_max_position == 64
    assert config.rope_scaling.factor == 2.0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'.*supported: llama, mistral, qwen2, qwen3, smollm3"),
    ({"model_type": None}, "model_type is None, expected a string"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole number from 1 to 4096"),
    ({"vocab_size": 10**400}, "vocab_size is a number of more than 128 bits"),
    ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
    ({"head_dim": 7}, "head_dim is 7"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ({"rope_theta": 0.5}, "rope_theta is 0.5"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ({"eos_token_id": [-5]}, r"eos_token_id is \[-5\]"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
    ({"rope_scaling": {"type": "mrope"}}, "rope_scaling: type is 'mrope'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is None"),
    ({"rope_scaling": {"type": "yarn", "factor": 1e20}}, "stretches the context"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "short_factor is .*expected 4"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers is"),
    ({"model_type": "smollm3", "no_rope_layers": [7] * 8}, "expected only 0 and 1"),
    ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 8}, "layer_types is"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 8}, "no sliding_window"),
    ({"model_type": "mistral", "sliding_window": 4, "layer_types": ["full_attention"] * 8}, "all layers or none"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_bad_value_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        config_from_hf(hf_values() | changes, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")


def test_random_values_give_a_config_or_model_file_error() -> None:
    odd = [
        None,
        -1,
        0,
        1,
        3,
        1.5,
        "x",
        "",
        [],
        [1],
        {},
        {"type": "yarn"},
        True,
        10**30,
        math.inf,
        math.nan,
        [None] * 99,
    ]
    keys = [*hf_values(), "head_dim", "rope_scaling", "rope_parameters", "layer_types", "sliding_window"]
    keys += ["no_rope_layers", "use_sliding_window", "max_window_layers", "tie_word_embeddings", "attention_bias"]
    chance = random.Random(7)
    opened = 0
    for _ in range(5000):
        family = chance.choice(["llama", "mistral", "qwen2", "qwen3", "smollm3"])
        changes = {chance.choice(keys[1:]): chance.choice(odd) for _ in range(chance.randint(1, 3))}
        try:
            config_from_hf(hf_values(family) | changes)
            opened += 1
        except ModelFileError:
            continue
    assert opened > 100


def test_gguf_config_reads_shapes_and_end_tokens() -> None:
    config = config_from_gguf(tiny_metadata())
    assert config.architecture == "llama"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (40, 32, 48)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 8)
    assert config.max_position == 128
    assert config.eos_token_ids == (39, 38)  # the named one first, then <|endoftext|>
    assert config.bos_token_id == 1


def test_gguf_tokens_that_are_no_strings_end_nothing() -> None:
    changes = {"tokenizer.ggml.tokens": [[1]] * 40, "tokenizer.ggml.token_type": [3] * 40}
    assert config_from_gguf(tiny_metadata() | changes).eos_token_ids == (39,)


def test_gguf_tensors_settle_biases_tied_head_and_vocabulary() -> None:
    shapes = {"token_embd.weight": (48, 32), "output.weight": (48, 32), "blk.0.attn_q.bias": (32,)}
    config = config_from_gguf(tiny_metadata(), shapes)
    assert config.vocab_size == 48
    assert not config.tie_word_embeddings
    assert config.attention_bias
    assert not config.output_bias
    assert config_from_gguf(tiny_metadata(), {}).tie_word_embeddings


def test_gguf_families_have_their_own_customs() -> None:
    assert config_from_gguf(tiny_metadata("qwen2")).attention_bias
    assert config_from_gguf(tiny_metadata("qwen3", attention__key_length=16)).head_dim == 16
    assert config_from_gguf(tiny_metadata("qwen3")).qk_norm
    assert config_from_gguf(tiny_metadata("smollm3", block_count=4)).rope_layers == (True, True, True, False)


def test_gguf_rope_scaling_is_read() -> None:
    linear = config_from_gguf(tiny_metadata(rope__scaling__type="linear", rope__scaling__factor=4.0))
    assert linear.rope_scaling == RopeScaling("linear", 4.0)
    assert config_from_gguf(tiny_metadata(rope__scale_linear=2.0)).rope_scaling == RopeScaling("linear", 2.0)
    values: dict[str, Any] = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    values["rope__scaling__original_context_length"] = 32
    yarn = config_from_gguf(tiny_metadata(**values)).rope_scaling
    assert yarn == RopeScaling("yarn", 4.0, original_max_position=32)
    scaled = config_from_gguf(tiny_metadata(**values, rope__scaling__attn_factor=2.0)).rope_scaling
    assert scaled.attention_factor == pytest.approx(2 * (1 + 0.1 * math.log(4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gpt2"}, "general.architecture is 'gpt2'.*supported: llama, qwen2, qwen3, smollm3"),
        ({"general.architecture": 5}, "general.architecture is 5, expected a string"),
        ({"llama.block_count": 0}, "llama.block_count is 0"),
        ({"llama.attention.head_count": [4, 4]}, r"llama.attention.head_count is \[4, 4\]"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, mixtures"),
        ({"llama.rope.dimension_count": 4}, r"llama.rope.dimension_count is 4, only the head dimension \(8\)"),
        ({"llama.attention.value_length": 16}, "llama.attention.value_length is 16"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
        ({"tokenizer.ggml.tokens": 3}, "llama.vocab_size is None"),
    ],
)
def test_bad_gguf_value_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        config_from_gguf(tiny_metadata() | changes, source="model.gguf")
    assert str(caught.value).startswith("model.gguf: ")
