"""The decode step of transformers' continuous batching: the same shape, random weights, the same batch."""

from __future__ import annotations

import importlib.util
import statistics
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch

from penstock.models.config import ModelConfig


class NoPeer(Exception):
    """It cannot be measured here; the message says why."""


def peer_step_seconds(config: ModelConfig, num_seqs: int, context: int, num_steps: int, device: torch.device) -> float:
    """Median time between two tokens of a request, in the second half of its tokens, when all requests decode.

    Raises NoPeer with the reason.
    """
    if importlib.util.find_spec("transformers") is None:
        raise NoPeer("transformers is not installed")
    try:
        results = _generate(config, num_seqs, context, num_steps, device)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError) as err:
        raise NoPeer(f"transformers' continuous batching failed: {type(err).__name__}: {err}") from err
    gaps = [gap for result in results for gap in _late_gaps(result)]
    if len(results) < num_seqs or not gaps:
        raise NoPeer(f"transformers finished {len(results)} of {num_seqs} requests and gave {len(gaps)} token times")
    return statistics.median(gaps)


def _late_gaps(result: Any) -> list[float]:
    times = getattr(result, "timestamps", None) or []
    late = times[len(times) // 2 :]
    return [after - before for before, after in pairwise(late)]


def _generate(config: ModelConfig, num_seqs: int, context: int, num_steps: int, device: torch.device) -> list[Any]:
    transformers = import_module("transformers")
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = transformers.LlamaForCausalLM(settings).eval()
    finally:
        torch.set_default_dtype(default)
    # Without the package it would fetch kernels, and there may be no network.
    batching = transformers.ContinuousBatchingConfig(
        auto_switch_to_flash=importlib.util.find_spec("flash_attn") is not None
    )
    generation = transformers.GenerationConfig(
        max_new_tokens=num_steps, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    prompts = torch.randint(1, config.vocab_size, (num_seqs, context)).tolist()
    results = model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=batching, record_timestamps=True
    )
    return [result for result in results.values() if result.error is None]
