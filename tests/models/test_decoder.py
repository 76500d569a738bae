"""The network against Hugging Face transformers, on the same random weights in float32."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from penstock.engine.batch import build_batch
from penstock.engine.interface import ScheduledSeq
from penstock.engine.kv_memory import KVMemory
from penstock.engine.model_runner import ModelRunner, layer_bytes, pool_view
from penstock.engine.torch_engine import build_decoder
from penstock.models.config import ModelConfig, RopeScaling
from penstock.testing.stepper import Stepper
from penstock.testing.tiny_model import random_weights, tiny_config

TOLERANCE = 1e-4  # on logits that spread over several units
BLOCK_SIZE = 4
NUM_BLOCKS = 96


class Network:
    """A decoder with a poisoned pool, driven step by step for logits."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        decoder = build_decoder(config, weights.items(), dtype)
        memory = KVMemory(NUM_BLOCKS, config.num_layers, layer_bytes(config, BLOCK_SIZE, dtype))
        self.pool = pool_view(memory, config, BLOCK_SIZE, dtype)
        self.pool.fill_(float("nan"))
        self.runner = ModelRunner(decoder, self.pool)
        self.stepper = Stepper(NUM_BLOCKS, BLOCK_SIZE)

    def logits(self, entries: list[ScheduledSeq]) -> torch.Tensor:
        """Run the entries and advance their sequences without sampling."""
        result = self.runner.run(build_batch(entries, BLOCK_SIZE))
        self.stepper.commit(entries, [()] * len(entries))
        return result.float()

    def last_logits(self, token_ids: list[int], chunks: list[int]) -> torch.Tensor:
        """Logits behind each chunk: the sequence grows by `chunks` tokens at a time. [len(chunks), vocab_size]."""
        seq, rows, end = self.stepper.add([]), [], 0
        for chunk in chunks:
            end += chunk
            seq.prompt_ids = token_ids[:end]
            rows.append(self.logits([self.stepper.schedule(seq)])[0])
        return torch.stack(rows)


def hf_logits(config: ModelConfig, weights: dict[str, torch.Tensor], token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), vocab_size] from transformers, without a cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="the test extra is not installed")
        names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
        name = names[config.architecture]
        hf_config = getattr(transformers, f"{name}Config")(**hf_fields(config))
        model = getattr(transformers, f"{name}ForCausalLM")(hf_config).eval().float()
        state = dict(weights)
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True)
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits


def hf_fields(config: ModelConfig) -> dict[str, object]:
    fields: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "rope_parameters": hf_rope(config),
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    if config.architecture == "smollm3":
        fields["no_rope_layers"] = [int(rotates) for rotates in config.rope_layers]
    if config.architecture not in ("llama", "mistral"):
        kinds = ("full_attention", "sliding_attention")
        fields["layer_types"] = [kinds[slides] for slides in config.window_layers]
    return fields


def hf_rope(config: ModelConfig) -> dict[str, object]:
    scaling = config.rope_scaling
    fields: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling.kind == "llama3":
        fields |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return fields


def prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


LLAMA3 = RopeScaling(kind="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
CONFIGS = {
    "llama": tiny_config(),
    "llama with biases": tiny_config(attention_bias=True, output_bias=True, mlp_bias=True),
    "llama 3 rope": tiny_config(rope_scaling=LLAMA3),
    "llama, every head its own KV": tiny_config(num_kv_heads=6),
    "llama, nine heads on one KV": tiny_config(num_heads=9, num_kv_heads=1),
    "mistral": tiny_config("mistral"),
    "qwen2": tiny_config("qwen2"),
    "qwen2 sliding in two layers": tiny_config("qwen2", sliding_window=20, window_layers=(False, True, True)),
    "qwen3": tiny_config("qwen3"),
    "smollm3": tiny_config("smollm3"),
}
CHUNKS = {
    "whole": [70],
    "token by token": [1] * 40,
    "prompt then tokens": [37, 1, 1, 1, 1, 1],
    "odd chunks": [3, 17, 4, 1, 13, 2, 30],
    "long chunks": [150, 130, 1, 20],
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_logits_equal_transformers(name: str, chunks: list[int]) -> None:
    config = CONFIGS[name]
    weights, token_ids = random_weights(config), prompt(sum(chunks))
    expected = hf_logits(config, weights, token_ids)
    ends = torch.tensor(chunks).cumsum(0) - 1
    actual = Network(config, weights).last_logits(token_ids, chunks)
    assert float(expected.std()) > 1  # the comparison is worth something
    torch.testing.assert_close(actual, expected[ends], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_ragged_batch_equals_one_by_one(name: str) -> None:
    config = CONFIGS[name]
    weights = random_weights(config)
    lengths = [1, 2, 3, 5, 16, 17, 33, 64, 130]
    network = Network(config, weights)
    seqs = [network.stepper.add(prompt(length, seed=length)) for length in lengths]
    together = [network.logits([network.stepper.schedule(seq) for seq in seqs])]
    for seq in seqs:
        seq.output_ids.append(7)
    together.append(network.logits([network.stepper.schedule(seq) for seq in seqs]))
    for row, length in enumerate(lengths):
        alone = Network(config, weights).last_logits([*prompt(length, seed=length), 7], [length, 1])
        torch.testing.assert_close(torch.stack([t[row] for t in together]), alone, atol=TOLERANCE, rtol=0)


def test_recycled_blocks_full_of_nan_change_nothing() -> None:
    config = CONFIGS["llama"]
    weights = random_weights(config)
    network = Network(config, weights)
    first = network.last_logits(prompt(50), [20, 1, 13, 16])
    network.pool.fill_(float("nan"))
    network.stepper = Stepper(NUM_BLOCKS, BLOCK_SIZE, seed=5)
    assert torch.equal(network.last_logits(prompt(50), [20, 1, 13, 16]), first)


def test_blocks_hold_nothing_of_earlier_users() -> None:
    config = CONFIGS["llama"]
    network = Network(config, random_weights(config))
    network.pool.fill_(123.0)
    seq = network.stepper.add(prompt(BLOCK_SIZE * 2 + 1))
    network.logits([network.stepper.schedule(seq)])
    assert not (network.pool[seq.block_table] == 123).any()
    assert (network.pool[seq.block_table[-1], :, :, 1:] == 0).all()


def test_same_step_twice_writes_the_same() -> None:
    config = CONFIGS["qwen3"]
    network = Network(config, random_weights(config))
    seq = network.stepper.add(prompt(11))
    network.logits([network.stepper.schedule(seq)])
    before = network.pool[seq.block_table].clone()
    seq.num_computed_tokens = 6
    network.logits([network.stepper.schedule(seq)])
    torch.testing.assert_close(network.pool[seq.block_table], before, atol=1e-5, rtol=0)


def test_rows_that_nobody_samples_give_no_logits() -> None:
    config = CONFIGS["llama"]
    network = Network(config, random_weights(config))
    seqs = [network.stepper.add(prompt(length)) for length in (30, 4)]
    logits = network.logits([network.stepper.schedule(seqs[0], 10), network.stepper.schedule(seqs[1])])
    assert logits.shape == (1, config.vocab_size)
    assert network.logits([network.stepper.schedule(seqs[0], 10)]).shape == (0, config.vocab_size)


def test_bfloat16_is_close_to_float32() -> None:
    config = CONFIGS["llama"]
    weights, chunks = random_weights(config), [40, 1, 1, 20]
    exact = Network(config, weights).last_logits(prompt(62), chunks)
    rounded = Network(config, weights, torch.bfloat16).last_logits(prompt(62), chunks)
    assert float((exact - rounded).abs().mean() / exact.std()) < 0.1


def test_config_without_window_layers_ignores_the_window() -> None:
    config = replace(CONFIGS["llama"], sliding_window=8)
    weights, token_ids = random_weights(config), prompt(40)
    with_window = Network(config, weights).last_logits(token_ids, [40])
    assert torch.equal(with_window, Network(CONFIGS["llama"], weights).last_logits(token_ids, [40]))
