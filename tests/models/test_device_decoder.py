"""The network out of fused operations against its twin `Decoder`, on the same random weights in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch

from penstock.engine.batch import Batch, build_batch
from penstock.engine.interface import ScheduledSeq
from penstock.engine.kv_memory import KVMemory
from penstock.engine.model_runner import ModelRunner, layer_bytes, pool_view
from penstock.engine.torch_engine import build_decoder
from penstock.kernels.choice import triton_everywhere
from penstock.kernels.paged_attention.device_plan import build_device_plan
from penstock.models.config import ModelConfig
from penstock.models.device_decoder import DeviceDecoder, DevicePool, DeviceStep, make_pool
from penstock.models.weights import load_weights
from penstock.testing.stepper import Stepper
from penstock.testing.tiny_model import random_weights, tiny_config

TOLERANCE = 1e-4  # on logits that spread over several units
BLOCK_SIZE = 4
NUM_BLOCKS = 40
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EIGHT_BITS = {torch.int8: 0.1, torch.float8_e4m3fn: 0.25}  # how far logits may move, as a share of their spread

CONFIGS = {
    "llama": tiny_config(),
    "llama with biases": tiny_config(attention_bias=True, output_bias=True, mlp_bias=True),
    "llama, nine heads on one KV": tiny_config(num_heads=9, num_kv_heads=1),
    "mistral, all layers sliding": tiny_config("mistral", sliding_window=9),
    "qwen2 sliding in two layers": tiny_config("qwen2", sliding_window=9, window_layers=(False, True, True)),
    "qwen3 with norms of heads": tiny_config("qwen3"),
    "smollm3 with a layer that does not rotate": tiny_config("smollm3"),
}


def device_decoder(config: ModelConfig, max_context: int = 128) -> DeviceDecoder:
    tensors = ((name, tensor.to(DEVICE)) for name, tensor in random_weights(config).items())
    return DeviceDecoder(config, load_weights(config, tensors, torch.float32), max_context)


def device_step(batch: Batch) -> DeviceStep:
    token_ids, positions, slots, rows = (
        torch.from_numpy(values).to(DEVICE)
        for values in (batch.token_ids, batch.positions, batch.slot_mapping, batch.sampled_rows)
    )
    plan = build_device_plan(batch.cu_seqlens_q, batch.context_lens, batch.block_table, DEVICE)
    return DeviceStep(token_ids, positions, slots, plan, rows)


def poisoned_pool(config: ModelConfig, dtype: torch.dtype = torch.float32) -> DevicePool:
    """What was never written is NaN, or where a type has none the largest code with a NaN for its scale."""
    pool = make_pool(config, NUM_BLOCKS, BLOCK_SIZE, dtype, DEVICE)
    if pool.scales is None:
        pool.numbers.fill_(torch.nan)
    else:
        pool.numbers.view(torch.uint8).fill_(0x7F)
        pool.scales.fill_(torch.nan)
    return pool


class Both:
    """The same steps through both networks, each with its own pool; the fused one by its references or its kernels."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        by: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.by = by
        decoder = build_decoder(config, random_weights(config).items(), torch.float32)
        memory = KVMemory(NUM_BLOCKS, config.num_layers, layer_bytes(config, BLOCK_SIZE, torch.float32))
        self.runner = ModelRunner(decoder, pool_view(memory, config, BLOCK_SIZE, torch.float32))
        self.device, self.pool = device_decoder(config), poisoned_pool(config, dtype)
        self.stepper = Stepper(NUM_BLOCKS, BLOCK_SIZE)

    def logits(self, entries: list[ScheduledSeq]) -> tuple[torch.Tensor, torch.Tensor]:
        """(fused, twin), each [sampled rows, vocab_size]; the sequences advance by what was computed."""
        batch = build_batch(entries, BLOCK_SIZE)
        with self.by():
            fused = self.device.forward(device_step(batch), self.pool).cpu()
        expected = self.runner.run(batch)
        self.stepper.commit(entries, [()] * len(entries))
        return fused, expected


def prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def steps_of(both: Both) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A long prompt in chunks beside a short one, then both decode: tiles, short queries, single tokens."""
    long, short = both.stepper.add(prompt(29)), both.stepper.add(prompt(3, seed=2))
    found = [both.logits([both.stepper.schedule(long, 19), both.stepper.schedule(short)])]
    short.output_ids.append(7)
    found.append(both.logits([both.stepper.schedule(short), both.stepper.schedule(long, 10)]))
    for token_id in (5, 300):
        short.output_ids.append(token_id)
        long.output_ids.append(token_id)
        found.append(both.logits([both.stepper.schedule(long), both.stepper.schedule(short)]))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_twin(name: str) -> None:
    for actual, expected in steps_of(Both(CONFIGS[name])):
        assert float(expected.std()) > 1  # the comparison is worth something
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("dtype", "most_apart"), EIGHT_BITS.items(), ids=str)
def test_eight_bit_pool_stays_near_the_twin(dtype: torch.dtype, most_apart: float) -> None:
    for actual, expected in steps_of(Both(CONFIGS["llama"], dtype)):
        assert 0 < float((actual - expected).std() / expected.std()) < most_apart


# In 8 bits a number on the border between two codes may fall to either side.
@pytest.mark.parametrize(("dtype", "most_apart"), [(torch.float32, TOLERANCE), (torch.int8, 2e-2)], ids=str)
def test_triton_kernels_give_what_the_references_give(dtype: torch.dtype, most_apart: float) -> None:
    pytest.importorskip("triton", reason="the GPU kernels are written in Triton, which is not installed")
    config = CONFIGS["qwen3 with norms of heads"]
    expected = steps_of(Both(config, dtype))
    actual = steps_of(Both(config, dtype, triton_everywhere))
    for (found, _), (by_reference, _) in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, by_reference, atol=most_apart, rtol=0)


def test_padding_stores_nothing_and_changes_no_row() -> None:
    config = CONFIGS["llama"]
    decoder, pools = device_decoder(config), [poisoned_pool(config) for _ in range(2)]
    ids, zeros = torch.tensor([3, 0], device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    table = np.array([[6], [0]])
    alone = build_device_plan(np.array([0, 1]), np.array([1]), table[:1], DEVICE)
    padded = build_device_plan(np.array([0, 1, 2]), np.array([1, 0]), table, DEVICE)
    slots = torch.tensor([6 * BLOCK_SIZE, -1], device=DEVICE)
    expected = decoder.forward(DeviceStep(ids[:1], zeros[:1], slots[:1], alone), pools[0])
    actual = decoder.forward(DeviceStep(ids, zeros, slots, padded), pools[1])
    torch.testing.assert_close(actual[:1], expected)
    assert actual.isfinite().all()
    assert torch.equal(pools[0].numbers.isnan(), pools[1].numbers.isnan())
