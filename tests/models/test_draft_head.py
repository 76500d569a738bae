"""Draft heads: both published layouts are read, what is wrong is named, steps give what the whole sequence gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.core.errors import ModelFileError
from penstock.models.draft_chain import DraftCache, draft_chain
from penstock.models.draft_config import FINAL_NORM, OUR_NORMS, head_config
from penstock.models.draft_file import load_draft_head, read_facts, save_draft_head
from penstock.models.draft_head import DraftHead
from penstock.testing.tiny_model import tiny_config

TARGET = tiny_config()
WIDTH, VOCAB, INNER, DRAFTED = TARGET.hidden_size, TARGET.vocab_size, 96, 100
Q_ROWS, KV_ROWS = TARGET.num_heads * TARGET.head_dim, TARGET.num_kv_heads * TARGET.head_dim
HF_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": TARGET.num_heads,
    "num_key_value_heads": TARGET.num_kv_heads,
    "head_dim": TARGET.head_dim,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / shape[-1] ** 0.5


ENDS = {"embedding": draw(VOCAB, WIDTH) * 4, "lm_head": draw(VOCAB, WIDTH) * 3}


def layer(prefix: str, width: int) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.self_attn.q_proj.weight": draw(Q_ROWS, width) * 2,
        f"{prefix}.self_attn.k_proj.weight": draw(KV_ROWS, width) * 2,
        f"{prefix}.self_attn.v_proj.weight": draw(KV_ROWS, width),
        f"{prefix}.self_attn.o_proj.weight": draw(WIDTH, Q_ROWS),
        f"{prefix}.mlp.gate_proj.weight": draw(INNER, WIDTH),
        f"{prefix}.mlp.up_proj.weight": draw(INNER, WIDTH),
        f"{prefix}.mlp.down_proj.weight": draw(WIDTH, INNER),
        f"{prefix}.post_attention_layernorm.weight": 1 + draw(WIDTH),
    }


def eagle() -> dict[str, torch.Tensor]:
    return {"fc.weight": draw(WIDTH, 2 * WIDTH), "fc.bias": draw(WIDTH), **layer("layers.0", WIDTH)}


def eagle3(prefix: str = "midlayer") -> dict[str, torch.Tensor]:
    drafted = torch.arange(0, 3 * DRAFTED, 3)
    return {
        **layer(prefix, 2 * WIDTH),
        f"{prefix}.hidden_norm.weight": 1 + draw(WIDTH),
        f"{prefix}.input_layernorm.weight": 1 - draw(WIDTH),
        "fc.weight": draw(WIDTH, 3 * WIDTH),
        "norm.weight": 1 + draw(WIDTH),
        "lm_head.weight": draw(DRAFTED, WIDTH) * 3,
        "d2t": drafted - torch.arange(DRAFTED),
        "t2d": torch.isin(torch.arange(VOCAB), drafted),
    }


def ours() -> dict[str, torch.Tensor]:
    tensors = {name: tensor for name, tensor in eagle().items() if name != "fc.bias"}
    return tensors | {name: 1 + draw(WIDTH + i)[:WIDTH] for i, name in enumerate(OUR_NORMS)}


def write(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    return folder


def write_eagle3(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    layers = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}
    return write(folder, tensors or eagle3(), **({"draft_vocab_size": DRAFTED} | layers | changes))


def load(path: Path) -> DraftHead:
    return load_draft_head(path, TARGET, ENDS["embedding"], ENDS["lm_head"])


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def plain_layer(tensors: dict[str, torch.Tensor], prefix: str, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """A Llama layer behind its entrance, written out row by row: x [rows, in], residual [rows, WIDTH]."""

    def weight(name: str) -> torch.Tensor:
        return tensors[f"{prefix}.{name}.weight"]

    half, size = TARGET.head_dim // 2, TARGET.head_dim
    inv_freq = 10_000.0 ** (-torch.arange(half) / half)

    def turned(name: str, row: int) -> torch.Tensor:
        heads = (weight(f"self_attn.{name}_proj") @ x[row]).view(-1, size)
        a, b, angle = heads[:, :half], heads[:, half:], row * inv_freq
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

    rows = []
    for row in range(len(x)):
        attended = []
        for head in range(TARGET.num_heads):
            kv_head = head // (TARGET.num_heads // TARGET.num_kv_heads)
            keys = torch.stack([turned("k", s)[kv_head] for s in range(row + 1)])
            values = (x[: row + 1] @ weight("self_attn.v_proj").T).view(row + 1, -1, size)[:, kv_head]
            attended.append((keys @ turned("q", row)[head] / size**0.5).softmax(-1) @ values)
        y = residual[row] + weight("self_attn.o_proj") @ torch.cat(attended)
        normed = norm(y, weight("post_attention_layernorm"))
        gate = torch.nn.functional.silu(weight("mlp.gate_proj") @ normed)
        rows.append(y + weight("mlp.down_proj") @ (gate * (weight("mlp.up_proj") @ normed)))
    return torch.stack(rows)


def test_eagle_head_computes_its_layout(tmp_path: Path) -> None:
    tensors = eagle()
    head = load(write(tmp_path, tensors))
    features, token_ids = draw(7, WIDTH) * 5, torch.arange(3, 10)
    x = torch.cat((ENDS["embedding"][token_ids], features), -1) @ tensors["fc.weight"].T + tensors["fc.bias"]
    expected = plain_layer(tensors, "layers.0", x, x)
    hidden = head.forward(features.unsqueeze(0), token_ids.unsqueeze(0))[0]
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.logits(hidden), expected @ ENDS["lm_head"].T, atol=1e-3, rtol=1e-3)
    assert head.config.target_layers == (FINAL_NORM,)
    assert head.draft_ids.tolist() == list(range(VOCAB))


def test_our_head_norms_both_parts_and_the_layers_entrance(tmp_path: Path) -> None:
    tensors, drafted = ours(), torch.arange(1, 1 + DRAFTED)
    head = load(write(tmp_path, tensors | {"d2t": torch.ones(DRAFTED).long()}, draft_vocab_size=DRAFTED))
    features, token_ids = draw(7, WIDTH) * 5, torch.arange(3, 10)
    embedded = norm(ENDS["embedding"][token_ids], tensors["embedding_layernorm.weight"])
    normed = norm(features, tensors["hidden_states_layernorm.weight"])
    residual = torch.cat((embedded, normed), -1) @ tensors["fc.weight"].T
    x = norm(residual, tensors["layers.0.input_layernorm.weight"])
    expected = plain_layer(tensors, "layers.0", x, residual)
    hidden = head.forward(features.unsqueeze(0), token_ids.unsqueeze(0))[0]
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.logits(hidden), expected @ ENDS["lm_head"][drafted].T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prefix", ["midlayer", "layers.0"])
@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_eagle3_head_computes_its_layout(tmp_path: Path, prefix: str, norm_before_residual: bool) -> None:
    tensors = eagle3(prefix)
    head = load(write_eagle3(tmp_path, tensors, norm_before_residual=norm_before_residual))
    features, token_ids = draw(7, 3 * WIDTH) * 5, torch.arange(3, 10)
    fused = features @ tensors["fc.weight"].T
    normed = norm(fused, tensors[f"{prefix}.hidden_norm.weight"])
    embedded = norm(ENDS["embedding"][token_ids], tensors[f"{prefix}.input_layernorm.weight"])
    residual = normed if norm_before_residual else fused
    expected = plain_layer(tensors, prefix, torch.cat((embedded, normed), -1), residual)
    hidden = head.forward(features.unsqueeze(0), token_ids.unsqueeze(0))[0]
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
    logits = norm(expected, tensors["norm.weight"]) @ tensors["lm_head.weight"].T
    torch.testing.assert_close(head.logits(hidden), logits, atol=1e-3, rtol=1e-3)
    assert head.config.target_layers == (0, 1, 2)
    assert head.draft_ids.tolist() == list(range(0, 3 * DRAFTED, 3))


def test_layers_that_the_file_does_not_name_are_those_of_the_paper(tmp_path: Path) -> None:
    path = write_eagle3(tmp_path, eagle_config=None)
    deep = tiny_config(num_layers=30, window_layers=(False,) * 30, rope_layers=(True,) * 30)
    head = load_draft_head(path, deep, ENDS["embedding"], ENDS["lm_head"])
    assert head.config.target_layers == (2, 15, 27)


def test_own_embedding_and_head_of_the_file_are_used(tmp_path: Path) -> None:
    own = draw(VOCAB, WIDTH) + 1
    head = load(write(tmp_path, eagle() | {"embed_tokens.weight": own, "lm_head.weight": own * 2}))
    torch.testing.assert_close(head.embedding.index_select(0, torch.arange(VOCAB)), own)
    torch.testing.assert_close(head.lm_head, own * 2)


def test_head_of_ours_comes_back_as_it_was_written(tmp_path: Path) -> None:
    config = head_config(TARGET, DRAFTED, INNER)
    tensors = ours()
    draft_ids = torch.arange(5, 5 + 2 * DRAFTED, 2)
    head = DraftHead(config, tensors, ENDS["embedding"], ENDS["lm_head"][draft_ids], draft_ids)
    path = tmp_path / "head.safetensors"
    save_draft_head(head, path, {"seed": "7"}, dtype=torch.float32, with_lm_head=False)
    again = load(path)
    assert again.config == config
    assert read_facts(path)["seed"] == "7"
    assert torch.equal(again.draft_ids, draft_ids)
    assert torch.equal(again.lm_head, head.lm_head)
    features, token_ids = draw(1, 6, WIDTH), torch.arange(6).unsqueeze(0)
    assert torch.equal(again.forward(features, token_ids), head.forward(features, token_ids))


@pytest.mark.parametrize("name", ["fc.weight", "layers.0.mlp.up_proj.weight", "layers.0.self_attn.k_proj.weight"])
def test_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = {n: t for n, t in eagle().items() if n != name}
    with pytest.raises(ModelFileError, match=f"model.safetensors: tensor {name} is missing"):
        load(write(tmp_path, tensors))


def test_missing_map_of_a_reduced_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="tensor d2t is missing"):
        load(write_eagle3(tmp_path, {n: t for n, t in eagle3().items() if n != "d2t"}))


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.mlp.up_proj.weight", "mask_hidden"])
def test_unknown_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelFileError, match=f"tensor {name} is not part of this architecture"):
        load(write(tmp_path, eagle() | {name: draw(WIDTH)}))


def test_misshapen_tensor_is_named(tmp_path: Path) -> None:
    problem = rf"tensor norm.weight has shape \[5\], the config calls for \[{WIDTH}\]"
    with pytest.raises(ModelFileError, match=problem):
        load(write_eagle3(tmp_path, eagle3() | {"norm.weight": draw(5)}))


def test_tensor_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="tensor d2t is F32, expected I64 or I32"):
        load(write_eagle3(tmp_path, eagle3() | {"d2t": torch.zeros(DRAFTED)}))


@pytest.mark.parametrize(
    "offsets", [torch.full((DRAFTED,), VOCAB), -torch.arange(DRAFTED), -torch.ones(DRAFTED).long()]
)
def test_map_that_leads_nowhere_or_twice_to_a_token_is_refused(tmp_path: Path, offsets: torch.Tensor) -> None:
    with pytest.raises(ModelFileError, match="tensor d2t leads beyond the vocabulary, or twice to one token"):
        load(write_eagle3(tmp_path, eagle3() | {"d2t": offsets}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": 84, "head_dim": 14}, "hidden_size is 84, the target's is 72"),
        ({"vocab_size": 400}, "vocab_size is 400, the target's is 320"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2; draft heads have one layer"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0, expected a whole number from 1 to 320"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 9]}}, r"is \[1, 9\], the target has 3 layers"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": "2"}}, "expected a list of 1 to 16 layers"),
        ({"norm_before_residual": "no"}, "norm_before_residual is 'no', expected true or false"),
    ],
)
def test_config_that_does_not_fit_names_the_field(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFileError, match=f"config.json.*{problem}"):
        load(write_eagle3(tmp_path, **changes))


def test_file_without_any_config_is_refused(tmp_path: Path) -> None:
    save_file(eagle(), tmp_path / "head.safetensors")
    with pytest.raises(ModelFileError, match=r"head.safetensors: config is None: no config.json lies beside the file"):
        load(tmp_path / "head.safetensors")


def test_pickles_and_folders_without_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin: draft heads are read from \.safetensors files"):
        load(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"holds 0 \.safetensors files"):
        load(tmp_path)


def test_broken_file_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "head.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelFileError, match=r"head\.safetensors: "):
        load(tmp_path / "head.safetensors")


@pytest.mark.parametrize("layout", ["eagle", "eagle3"])
def test_chain_of_guesses_is_the_whole_sequence_with_guesses_put_in(tmp_path: Path, layout: str) -> None:
    """Rounds of several lengths over one cache; each guess is computed anew over everything before it."""
    head = load(write(tmp_path, eagle()) if layout == "eagle" else write_eagle3(tmp_path))
    size, count = head.config.feature_size, 4
    features, token_ids = draw(12, size) * 5, torch.arange(40, 52)
    cache, start = DraftCache(head, 12 + count), 0
    for stop in (5, 6, 9, 12):
        chain = draft_chain(head, cache, features[start:stop], token_ids[start:stop], count)
        assert cache.num_rows == stop
        hidden, ids = head.fuse(features[:stop]), token_ids[:stop]
        for number in range(count):
            output = whole(head, hidden, ids)
            torch.testing.assert_close(chain.logits[number], head.logits(output[-1]), atol=1e-4, rtol=1e-4)
            assert chain.token_ids[number] == int(head.draft_ids[head.logits(output[-1]).argmax()])
            hidden = torch.cat((hidden, output[-1:]))
            ids = torch.cat((ids, torch.tensor([chain.token_ids[number]])))
        start = stop


def whole(head: DraftHead, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """`forward` behind `fuse`."""
    row = head.enter(hidden, token_ids, torch.arange(len(hidden)))
    q, k, v = (x.transpose(0, 1) for x in (row.q, row.k, row.v))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return head.leave(row.residual, attended.transpose(0, 1))


def test_rows_before_the_cache_began_are_not_seen_and_positions_are_relative(tmp_path: Path) -> None:
    head = load(write_eagle3(tmp_path))
    features, token_ids = draw(6, head.config.feature_size), torch.arange(6)
    chains = [draft_chain(head, DraftCache(head, 9, first), features, token_ids, 3) for first in (0, 200)]
    torch.testing.assert_close(chains[0].logits, chains[1].logits, atol=1e-4, rtol=1e-4)
    assert chains[0].token_ids == chains[1].token_ids
