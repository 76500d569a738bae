"""Decode steps of a network with random weights in CUDA graphs, against the bytes that a step has to move.

A step reads every weight of its products once and the keys and values of all contexts; its floor is these bytes by
the measured rate of a copy. The figure is wall time over many steps, the host's part and the read-back included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from penstock.benchmarks.gpu_figures import Figure
from penstock.benchmarks.quick import say
from penstock.engine.decode_batch import DecodeBatch
from penstock.engine.decode_loop import Decoding, decode
from penstock.engine.graph_step import GraphStep
from penstock.kernels.gpu_limits import bytes_per_second
from penstock.kernels.paged_attention.device_plan import build_device_plan
from penstock.models.config import ModelConfig
from penstock.models.decoder import DecoderWeights, rotate
from penstock.models.device_decoder import DeviceDecoder, DevicePool, DeviceStep, make_pool
from penstock.models.rope import rope_angles, rope_frequencies
from penstock.models.weights import load_weights
from penstock.testing.tiny_model import draw_weights

BAR = 1 / 1.3
BLOCK_SIZE = 16
MOST_APART = 0.05  # of the logits' spread: what bfloat16 may do in two layers

LLAMA_8B = ModelConfig(
    architecture="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    max_position=131_072,
    window_layers=(False,) * 32,
    rope_layers=(True,) * 32,
)


def random_network(
    config: ModelConfig, max_context: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> DeviceDecoder:
    """Made on the device, a tensor at a time."""
    tensors = draw_weights(config, torch.Generator(device).manual_seed(0), dtype)
    return DeviceDecoder(config, load_weights(config, tensors, dtype), max_context)


def with_layers(config: ModelConfig, num_layers: int) -> ModelConfig:
    windows, rope = config.window_layers[:num_layers], config.rope_layers[:num_layers]
    return replace(config, num_layers=num_layers, window_layers=windows, rope_layers=rope)


def plain_logits(config: ModelConfig, weights: DecoderWeights, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits behind the last of token_ids [n], out of torch's parts alone, in the weights' type; no cache, no bias."""
    angles = rope_angles(torch.arange(len(token_ids)), *rope_frequencies(config))
    cos, sin = (part.to(token_ids.device, weights.embedding.dtype)[:, None] for part in angles)
    rotation = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    x = weights.embedding.index_select(0, token_ids)
    for layer in weights.layers:
        qkv = layer.qkv(F.rms_norm(x, x.shape[-1:], layer.attention_norm, config.rms_norm_eps))
        q, k, v = (part.contiguous() for part in torch.split(qkv.view(len(x), -1, config.head_dim), sizes, 1))
        rotate(q, rotation)
        rotate(k, rotation)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        x = x + layer.output(attended.reshape(len(x), -1))
        gate, up = layer.gate_up(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, config.rms_norm_eps)).chunk(2, dim=-1)
        x = x + layer.down(F.silu(gate) * up)
    return weights.head(F.rms_norm(x[-1:], x.shape[-1:], weights.norm, config.rms_norm_eps))


def check_network(config: ModelConfig, num_tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """How far a prompt's last logits are from torch's, as a share of their spread. AssertionError beyond MOST_APART."""
    decoder = random_network(config, num_tokens, device, dtype)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    token_ids = torch.randint(config.vocab_size, (num_tokens,), device=device)
    positions, plan_table = torch.arange(num_tokens, device=device), np.arange(num_blocks)[None]
    plan = build_device_plan(np.array([0, num_tokens]), np.array([num_tokens]), plan_table, device)
    step = DeviceStep(token_ids, positions, positions, plan, positions[-1:])
    actual = decoder.forward(step, make_pool(config, num_blocks, BLOCK_SIZE, dtype, device)).float()
    with torch.inference_mode():
        expected = plain_logits(config, decoder.weights, token_ids).float()
    apart = float((actual - expected).std() / expected.std())
    if not apart <= MOST_APART:
        raise AssertionError(f"logits differ from torch's by {apart:.3f} of their spread")
    return apart


def floor_bytes(decoder: DeviceDecoder, pool: DevicePool, num_seqs: int, context: float) -> float:
    """Weights once, and keys and values of `context` tokens for each sequence."""
    weights = decoder.weights
    products = [p for layer in weights.layers for p in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    a_token = pool.numbers[0].nbytes / pool.block_size
    return sum(product.num_bytes for product in (*products, weights.head)) + num_seqs * context * a_token


def step_seconds(decoder: DeviceDecoder, pool: DevicePool, num_seqs: int, context: int, num_steps: int) -> float:
    """Wall time of a step, its graph captured before. The pool holds random keys and values of `context` tokens."""
    step = GraphStep(decoder, pool, num_seqs, context + num_steps)
    check_replay(step, num_seqs, pool.num_blocks // num_seqs, context)
    table = np.arange(pool.num_blocks).reshape(num_seqs, -1)
    times = []
    for _ in range(3):
        seqs = [Decoding(row, context, 1, num_steps) for row in table]
        start = time.perf_counter()
        decode(step, seqs)  # ends when the last ids are read
        times.append((time.perf_counter() - start) / num_steps)
    return sorted(times)[1]


def check_replay(step: GraphStep, num_seqs: int, per_seq: int, context: int) -> None:
    """Raises AssertionError unless a replay gives the ids of the step that was launched kernel by kernel."""
    known = np.arange(num_seqs) % 100
    table = np.arange(num_seqs * per_seq).reshape(num_seqs, per_seq)
    batch = DecodeBatch(np.full(num_seqs, context + 1), table, np.full(num_seqs, -1), known)
    first, second = (step.launch(batch).wait() for _ in range(2))
    if not np.array_equal(first, second) or first.min() < 0:
        raise AssertionError(f"the first step drew {first}, its replay {second}")


def decode_steps(
    device: torch.device, config: ModelConfig, num_seqs: int, contexts: list[int], num_steps: int = 64
) -> Iterator[Figure]:
    """One figure for each length of context, the bar on all of them."""
    apart = check_network(with_layers(config, 2), 257, device, torch.bfloat16)
    say(f"two layers of the network: logits differ from torch's by {apart:.4f} of their spread")
    decoder = random_network(config, max(contexts) + num_steps, device)
    for context in contexts:
        per_seq = -(-(context + num_steps) // BLOCK_SIZE)
        pool = make_pool(config, num_seqs * per_seq, BLOCK_SIZE, torch.bfloat16, device)
        pool.numbers.normal_(std=0.5)
        floor = floor_bytes(decoder, pool, num_seqs, context + num_steps / 2) / bytes_per_second()
        elapsed = step_seconds(decoder, pool, num_seqs, context, num_steps)
        figure = Figure(f"decode step, {num_seqs} sequences of {context}", elapsed, floor, BAR)
        say(f"{figure.name}: {elapsed * 1e3:.2f} ms, {elapsed / floor:.2f} x its floor ({figure.verdict})")
        yield figure
        del pool
