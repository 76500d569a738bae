"""Whole checkpoints: GGUF files and Hugging Face folders give the same canonical weights, or one clear error."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.core.errors import ModelFileError
from penstock.models.checkpoint import open_checkpoint
from penstock.models.dequantize import dequantize
from penstock.models.gguf import read_gguf
from penstock.models.gguf_checkpoint import gguf_name
from penstock.models.rope import rope_frequencies
from penstock.models.weight_shapes import weight_shapes
from penstock.tests.models.gguf_files import (
    StoredTensor,
    build_gguf,
    find_smollm2,
    float_tensor,
    tiny_gguf,
    tiny_metadata,
    tiny_tensors,
)

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"pad_token_id": 0}),
}


def tiny_model(family: str, **changes: Any) -> Any:
    """A random transformers model with 4 layers."""
    transformers = pytest.importorskip("transformers")
    config_name, model_name, extra = FAMILIES[family]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = getattr(transformers, config_name)(**sizes | heads | extra | changes)
    return getattr(transformers, model_name)(config)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_loads_with_the_same_names_and_values(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.architecture == family
    assert_same(dict(checkpoint.tensors()), weights_of(model))
    assert weight_shapes(checkpoint.config).keys() == weights_of(model).keys()


def test_saved_folder_keeps_bfloat16(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same(dict(open_checkpoint(tmp_path).tensors()), weights_of(model))


def test_sharded_folder_loads_every_shard(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(dict(open_checkpoint(tmp_path).tensors()), weights_of(model))


def test_generation_config_adds_end_tokens(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert open_checkpoint(tmp_path).config.eos_token_ids == (2, 7)


def stored(name: str, weight: torch.Tensor, num_pairs_of: int | None) -> StoredTensor:
    """As llama.cpp's converter writes it; `num_pairs_of` heads have their rows put in rotated pairs."""
    values = weight.numpy()
    if num_pairs_of is not None:
        halves = values.reshape(num_pairs_of, 2, -1, *values.shape[1:])
        values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
    return float_tensor(gguf_name(name), values)


def write_gguf(path: Path, model: Any, family: str) -> None:
    config = model.config
    tensors = []
    for name, weight in weights_of(model).items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        paired = heads.get(name.split(".")[-2]) if family in ("llama", "smollm3") else None
        tensors.append(stored(name, weight, paired))
    changes = {"block_count": 4, "attention__layer_norm_rms_epsilon": config.rms_norm_eps}
    if family == "qwen3":
        changes |= {"attention__key_length": 16, "attention__value_length": 16}
    path.write_bytes(build_gguf(tiny_metadata(family, **changes), tensors))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
def test_gguf_rows_come_back_in_canonical_order(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    write_gguf(tmp_path / "model.gguf", model, family)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(dict(checkpoint.tensors()), weights_of(model))
    assert checkpoint.config.attention_bias == (family in ("llama", "qwen2"))
    assert checkpoint.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_gguf_half_types_keep_their_dtype(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    embedding = np.frombuffer(tensors[0].raw, dtype="<f4").reshape(40, 32)
    tensors[0] = tensors[0]._replace(kind=1, raw=embedding.astype("<f2").tobytes())
    bits = torch.ones(32, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    tensors[1] = tensors[1]._replace(kind=30, raw=bits)
    (tmp_path / "model.gguf").write_bytes(build_gguf(tiny_metadata(), tensors))
    weights = dict(open_checkpoint(tmp_path).tensors())
    assert weights["model.embed_tokens.weight"].dtype == torch.float16
    assert torch.equal(weights["model.embed_tokens.weight"], torch.from_numpy(embedding.astype(np.float16)))
    assert torch.equal(weights["model.norm.weight"], torch.ones(32, dtype=torch.bfloat16))


def test_gguf_weights_are_the_callers_own(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_gguf())
    for _, weight in open_checkpoint(path).tensors():
        weight.zero_()
    assert path.read_bytes() == tiny_gguf()


def test_gguf_rope_divisors_divide_the_frequencies(tmp_path: Path) -> None:
    divisors = np.array([1.0, 2.0, 4.0, 8.0])
    data = build_gguf(tiny_metadata(), [*tiny_tensors(), float_tensor("rope_freqs.weight", divisors)])
    (tmp_path / "model.gguf").write_bytes(data)
    scaled, gain = rope_frequencies(open_checkpoint(tmp_path).config)
    (tmp_path / "model.gguf").write_bytes(tiny_gguf())
    plain, _ = rope_frequencies(open_checkpoint(tmp_path).config)
    torch.testing.assert_close(scaled, plain / torch.tensor(divisors, dtype=torch.float32))
    assert gain == 1.0


@pytest.mark.parametrize(
    ("divisors", "message"),
    [(np.ones(3), r"expected F32 \[4\]"), (np.array([1.0, 0.0, 1.0, 1.0]), "not a finite number above 0")],
)
def test_gguf_bad_rope_divisors_are_refused(tmp_path: Path, divisors: np.ndarray, message: str) -> None:
    data = build_gguf(tiny_metadata(), [*tiny_tensors(), float_tensor("rope_freqs.weight", divisors)])
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(tmp_path)


def without(name: str) -> list[StoredTensor]:
    return [tensor for tensor in tiny_tensors() if tensor.name != name]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("blk.1.ffn_up.weight"), r"tensor blk\.1\.ffn_up\.weight is missing"),
        (without("token_embd.weight"), r"tensor token_embd\.weight is missing"),
        ([], "is missing \\(and 19 more\\)"),
        (
            [*without("output_norm.weight"), float_tensor("output_norm.weight", np.ones(31))],
            r"output_norm\.weight has shape \[31\], the config calls for \[32\]",
        ),
        (tiny_tensors(head_dim=16), r"has shape \[64, 32\], the config calls for \[32, 32\]"),
        ([*tiny_tensors(), float_tensor("blk.0.ffn_gate_exps.weight", np.ones(4))], "is not part of this architecture"),
    ],
)
def test_gguf_weights_that_contradict_the_config_are_refused(
    tmp_path: Path, tensors: list[StoredTensor], message: str
) -> None:
    (tmp_path / "model.gguf").write_bytes(build_gguf(tiny_metadata(), tensors))
    with pytest.raises(ModelFileError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith("model.gguf: ")


def test_identity_follows_content_not_name(tmp_path: Path) -> None:
    def identity(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return open_checkpoint(tmp_path / name).identity

    base = identity("a.gguf", tiny_gguf())
    assert base == identity("b.gguf", tiny_gguf())
    assert len(base) == 32
    assert base != identity("c.gguf", build_gguf(tiny_metadata(), tiny_tensors(seed=1)))
    assert base != identity("d.gguf", build_gguf(tiny_metadata(context_length=64), tiny_tensors()))


def test_folder_with_two_gguf_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(tiny_gguf())
    with pytest.raises(ModelFileError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ModelFileError, match="never loaded; convert the model to safetensors"):
            open_checkpoint(path)


def test_paths_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file or folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ModelFileError, match=r"holds no \.safetensors and no \.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match="pass the folder"):
        open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"config\.json: cannot be read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{", b"\xff\xfe", b'{"a":' * 100_000, b'{"vocab_size": ' + b"9" * 5000]
)
def test_broken_config_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(64))
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
        open_checkpoint(tmp_path)


def saved_llama(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(folder)
    return folder / "model.safetensors"


def rewrite_header(path: Path, change: dict[str, Any]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"] |= change
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "I64"}, r"model\.norm\.weight: dtype is 'I64', supported: F32, F16, BF16"),
        ({"dtype": []}, r"dtype is \[\]"),
        ({"shape": [-1]}, r"shape is \[-1\]"),
        ({"shape": [1 << 62, 1 << 62]}, "does not fit"),
        ({"shape": "x"}, "shape is 'x'"),
        ({"data_offsets": [0, 1 << 62]}, "expected a range inside"),
        ({"data_offsets": [8, 4]}, "expected a range inside"),
    ],
)
def test_broken_safetensors_header_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rewrite_header(saved_llama(tmp_path), change)
    with pytest.raises(ModelFileError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith("model.safetensors: ")


def test_safetensors_header_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    path = saved_llama(tmp_path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])
    with pytest.raises(ModelFileError, match="header length is 4611686018427387904"):
        open_checkpoint(tmp_path)


def test_damaged_safetensors_raise_only_model_file_error(tmp_path: Path) -> None:
    path = saved_llama(tmp_path)
    data = path.read_bytes()
    refusals: list[str] = []
    for seed in range(400):
        chance = random.Random(seed)
        damaged = bytearray(data)
        for _ in range(3):
            damaged[chance.randrange(5000)] = chance.randrange(256)
        path.write_bytes(damaged[: chance.randrange(8, len(damaged))] if seed % 3 == 0 else damaged)
        try:
            dict(open_checkpoint(tmp_path).tensors())
        except ModelFileError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert max(map(len, refusals)) < 600


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {}}, "weight_map is {}"),
        ({"weight_map": {"a": "../other.safetensors"}}, r"weight_map names '\.\./other\.safetensors'"),
        ({"weight_map": {"a": 5}}, "weight_map names 5"),
        ({"weight_map": {"a": "none.safetensors"}}, r"none\.safetensors: cannot be read"),
    ],
)
def test_broken_index_is_refused(tmp_path: Path, index: dict[str, Any], message: str) -> None:
    saved_llama(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(tmp_path)


def test_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    path = saved_llama(tmp_path)
    (tmp_path / "copy.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(ModelFileError, match="is in more than one file"):
        open_checkpoint(tmp_path)


def test_smollm2_opens_with_canonical_weights() -> None:
    path = find_smollm2()
    checkpoint = open_checkpoint(path)
    assert (checkpoint.config.num_layers, checkpoint.config.head_dim, checkpoint.config.vocab_size) == (30, 64, 49152)
    assert checkpoint.config.eos_token_ids == (2, 0)
    weights = checkpoint.tensors()
    name, embedding = next(weights)
    assert name == "model.embed_tokens.weight"
    assert embedding.shape == (49152, 576)
    assert embedding.dtype == torch.float32
    file = read_gguf(path)
    gguf = pytest.importorskip("gguf")
    raw = file.raw("token_embd.weight").reshape(49152, -1)[:100]
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(embedding[:100].numpy(), expected)
    query = next(weight for name, weight in weights if name == "model.layers.0.self_attn.q_proj.weight")
    stored_query = dequantize(file.raw("blk.0.attn_q.weight"), file.tensors["blk.0.attn_q.weight"].format)
    pairs = stored_query.reshape(9, 32, 2, 576)
    assert np.array_equal(query.numpy().reshape(9, 2, 32, 576), pairs.swapaxes(1, 2))
