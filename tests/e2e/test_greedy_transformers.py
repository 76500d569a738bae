"""Greedy output and logprobs of the engine equal those of Hugging Face transformers on the same weights, in float32."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.decode_node.local import LocalRunner
from penstock.models.checkpoint import open_checkpoint
from penstock.protocol.messages import SampledToken
from penstock.protocol.sampling import SamplingParams

from .conftest import MakeEngine

NUM_NEW = 64
LOGPROB_TOLERANCE = 1e-3

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def oracle(model_path: Path) -> Any:
    """transformers' LlamaForCausalLM with the dequantised tensors of the same file."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = open_checkpoint(model_path)
    config = checkpoint.config
    model = LlamaForCausalLM(
        LlamaConfig.from_dict(  # takes rope_theta, which is no argument of newer releases
            {
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "rms_norm_eps": config.rms_norm_eps,
                "rope_theta": config.rope_theta,
                "max_position_embeddings": config.max_position,
                "tie_word_embeddings": True,
            }
        )
    )
    state = {name: tensor.float() for name, tensor in checkpoint.tensors()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def test_greedy_equals_transformers_for_64_tokens_of_every_prompt(
    oracle: Any, make_engine: MakeEngine, chats: list[list[int]]
) -> None:
    assert len(chats) >= 20
    runner = LocalRunner(make_engine(64), max_batch_tokens=48)
    params = SamplingParams(max_tokens=NUM_NEW, temperature=0, logprobs=20, ignore_eos=True)
    for prompt in chats:
        tokens = [token for item in runner.stream(prompt, params) for token in item.tokens]
        assert len(tokens) == NUM_NEW
        _compare(oracle, prompt, tokens)


def _compare(oracle: Any, prompt: list[int], tokens: list[SampledToken]) -> None:
    """One forward over prompt and answer: the oracle would have chosen every token of it, with the same logprobs."""
    ids = prompt + [token.token_id for token in tokens]
    with torch.inference_mode():
        logprobs = torch.log_softmax(oracle(torch.tensor([ids])).logits[0].float(), dim=-1)
    rows = logprobs[len(prompt) - 1 : -1]
    assert rows.argmax(dim=-1).tolist() == ids[len(prompt) :]
    for row, token in zip(rows, tokens, strict=True):
        assert token.logprob is not None
        expected = row[[token_id for token_id, _ in token.logprob.top]]
        found = torch.tensor([value for _, value in token.logprob.top])
        assert (expected - found).abs().max() < LOGPROB_TOLERANCE
