"""The native step beside the decoder that it replaces, and what it promises beyond: the same bits in every batch."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from penstock.core.errors import InternalError
from penstock.engine.batch import build_batch
from penstock.engine.interface import ScheduledSeq
from penstock.engine.kv_memory import KVMemory
from penstock.engine.model_runner import ModelRunner, layer_bytes, pool_view
from penstock.engine.torch_engine import build_decoder
from penstock.kernels.decoder_step.op import likeliest
from penstock.kernels.native import library
from penstock.models.config import ModelConfig
from penstock.testing.stepper import Stepper
from penstock.testing.tiny_model import random_weights, tiny_config

from .native_levels import native_level

__all__ = ["native_level"]

NUM_BLOCKS = 160
# A number that falls on the border between two codes is rounded either way; the logits spread over several units.
CLOSE = 0.15
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qwen3": {"architecture": "qwen3", "qk_norm": True},
    "bias": {"architecture": "qwen2", "attention_bias": True},
    "untied": {"tie_word_embeddings": False},
    "window": {"architecture": "mistral", "sliding_window": 9, "window_layers": (True, False, True)},
    "no rope": {"rope_layers": (True, False, True)},
    "eight heads share one": {"num_heads": 8, "num_kv_heads": 1},
    "head of 32": {"head_dim": 32},
    "head of 80": {"head_dim": 80},
    "head of 96": {"head_dim": 96},
    "head of 128": {"head_dim": 128},
}


def config_of(**changes: Any) -> ModelConfig:
    return replace(tiny_config(max_position=2048), hidden_size=64, intermediate_size=96, **changes)


class Runs:
    """The same network twice, native and not, each with a pool that was poisoned."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, block_size: int = 4) -> None:
        self.config, self.dtype, self.block_size = config, dtype, block_size
        weights = random_weights(config)
        self.decoder = build_decoder(config, weights.items(), dtype, grouped=True)
        self.native, self.twin = self.runner(), self.runner()
        assert self.native.is_native
        self.twin._step = None

    def runner(self) -> ModelRunner:
        memory = KVMemory(NUM_BLOCKS, self.config.num_layers, layer_bytes(self.config, self.block_size, self.dtype))
        pool = pool_view(memory, self.config, self.block_size, self.dtype)
        pool.fill_(float("nan"))
        return ModelRunner(self.decoder, pool)

    def stepper(self) -> Stepper:
        return Stepper(NUM_BLOCKS, self.block_size)

    def step(self, runner: ModelRunner, stepper: Stepper, entries: list[ScheduledSeq]) -> torch.Tensor:
        result = runner.run(build_batch(entries, self.block_size))
        stepper.commit(entries, [()] * len(entries))
        return result

    def last(self, runner: ModelRunner, token_ids: list[int], chunks: list[int]) -> torch.Tensor:
        """Logits behind the last of `token_ids`, computed in these chunks."""
        stepper = self.stepper()
        seq, end, found = stepper.add([]), 0, torch.empty(0)
        for chunk in chunks:
            end += chunk
            seq.prompt_ids = token_ids[:end]
            found = self.step(runner, stepper, [stepper.schedule(seq)])
        assert end == len(token_ids)
        return found


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(320), k=count)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_decoder(native_level: str, name: str) -> None:
    runs = Runs(config_of(**VARIANTS[name]))
    for chunks in ([1], [7], [40], [20, 3, 1, 1]):
        ids = tokens(sum(chunks), seed=sum(chunks))
        native, twin = runs.last(runs.native, ids, chunks), runs.last(runs.twin, ids, chunks)
        assert native.isfinite().all()
        assert (native - twin).abs().max() < CLOSE, (name, chunks, float((native - twin).abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_every_cache_type_and_block_size(native_level: str, dtype: torch.dtype, block_size: int) -> None:
    runs = Runs(config_of(head_dim=64), dtype, block_size)
    ids = tokens(75)
    native, twin = runs.last(runs.native, ids, [70, 4, 1]), runs.last(runs.twin, ids, [70, 4, 1])
    assert (native - twin).abs().max() < (CLOSE if dtype is torch.float32 else 2 * CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_has_the_same_bits_however_it_comes(native_level: str, dtype: torch.dtype) -> None:
    """In a prompt, in chunks of it, in a decode step, with one thread or three: what lets a stream go on elsewhere."""
    runs = Runs(config_of(head_dim=64), dtype, block_size=16)
    ids = tokens(1100)
    whole = runs.last(runs.native, ids, [1100])
    assert torch.equal(runs.last(runs.runner(), ids, [600, 9, 490, 1]), whole)
    assert torch.equal(runs.last(runs.runner(), ids, [1097, 3]), whole)
    short = runs.last(runs.native, ids[:60], [60])
    runs.native.num_threads = 3
    assert torch.equal(runs.last(runs.native, ids[:60], [1] * 60), short)


def test_token_has_the_same_bits_whatever_stands_beside_it(native_level: str) -> None:
    runs = Runs(config_of(head_dim=64), torch.bfloat16, block_size=16)
    alone = [runs.last(runs.runner(), tokens(length, length), [length]) for length in (1, 5, 9, 40, 130)]
    runner, stepper = runs.runner(), runs.stepper()
    seqs = [stepper.add(tokens(length, length)) for length in (1, 5, 9, 40, 130)]
    together = runs.step(runner, stepper, [stepper.schedule(seq) for seq in seqs])
    assert torch.equal(torch.cat(alone), together)


def test_layers_are_told_in_order_and_an_error_comes_through(native_level: str) -> None:
    runs = Runs(config_of())
    stepper = runs.stepper()
    heard: list[int] = []
    batch = build_batch([stepper.schedule(stepper.add(tokens(20)))], runs.block_size)
    runs.native.run(batch, heard.append)
    assert heard == [1, 2, 3]

    def fail(num_layers: int) -> None:
        raise KeyError(num_layers)

    with pytest.raises(KeyError, match="1"):
        runs.native.run(batch, fail)


def test_chunk_that_samples_nothing_only_stores(native_level: str) -> None:
    runs = Runs(config_of())
    stepper = runs.stepper()
    seq = stepper.add(tokens(20))
    first = ScheduledSeq(stepper.schedule(seq).seq, 15)
    assert runs.step(runs.native, stepper, [first]).shape == (0, 320)
    rest = runs.step(runs.native, stepper, [ScheduledSeq(seq, 5)])
    assert torch.equal(rest, runs.last(runs.runner(), tokens(20), [20]))


def test_likeliest_tokens_are_those_of_the_logits(native_level: str) -> None:
    runs = Runs(config_of())
    stepper = runs.stepper()
    entries = [stepper.schedule(stepper.add(tokens(length, length))) for length in (3, 30)]
    result = runs.native.step(build_batch(entries, runs.block_size))
    twin = likeliest(result.logits)
    assert result.best.tolist() == twin.best.tolist()
    assert result.highest.tolist() == twin.highest.tolist()


def test_step_is_taken(native_level: str) -> None:
    runs = Runs(config_of())
    before = library.calls["decoder_step"]
    runs.last(runs.native, tokens(3), [3])
    runs.last(runs.twin, tokens(3), [3])
    assert library.calls["decoder_step"] == before + 1


def test_pool_of_another_shape_is_refused(native_level: str) -> None:
    runs, other = Runs(config_of()), Runs(config_of(num_kv_heads=1))
    stepper = runs.stepper()
    runs.native._pool = other.native._pool
    with pytest.raises(InternalError, match="the pool is"):
        runs.native.run(build_batch([stepper.schedule(stepper.add(tokens(3)))], runs.block_size))


def test_taps_give_the_hidden_states_of_sampled_rows() -> None:
    """As the twin takes them: after the embedding, each layer and the last norm, for few rows and for many."""
    runs = Runs(config_of())
    layers = (0, 1, runs.config.num_layers, -1)
    for lengths in ([1], [3, 9, 1], [20, 33]):
        found = []
        for runner in (runs.native, runs.twin):
            runner.taps = layers
            stepper, rng = runs.stepper(), random.Random(3)
            seqs = [stepper.add([rng.randrange(1, 300) for _ in range(length)]) for length in lengths]
            batch = build_batch([stepper.schedule(seq) for seq in seqs], runs.block_size)
            result = runner.step(batch)
            assert result.features is not None
            assert result.features.shape == (len(lengths), len(layers), runs.config.hidden_size)
            found.append(result.features)
        native, twin = found
        assert torch.equal(native[:, 0], twin[:, 0])
        assert (native - twin).abs().max() < CLOSE
        assert (native[:, 1] - native[:, 2]).abs().max() > CLOSE
        assert runs.native.step(batch).features is not None
    runs.native.taps = ()
    assert runs.native.step(batch).features is None
