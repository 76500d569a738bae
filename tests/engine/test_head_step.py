"""A draft head's step: the torch one is the chain of `models.draft_chain`, the native one agrees with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from penstock.engine.speculation.head_cache import FIRST_SLOTS, HeadCache
from penstock.engine.speculation.head_step import HeadRows, HeadStep, NativeHeadStep, TorchHeadStep, make_head_step
from penstock.kernels.quant_linear.grouped import expand, group_in_4_bits
from penstock.kernels.quant_linear.op import is_native
from penstock.models.draft_chain import DraftCache, draft_chain
from penstock.models.draft_head import DraftHead
from penstock.testing.tiny_head import LAYOUTS, random_head
from penstock.testing.tiny_model import tiny_config

TARGET = tiny_config(hidden_size=96)
CAPACITY, STARTS = 24, (0, 70, 300)  # positions where the sequences' rows begin


@pytest.fixture(params=LAYOUTS)
def head(request: pytest.FixtureRequest) -> DraftHead:
    return random_head(request.param, TARGET)


def features_of(head: DraftHead, rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, head.config.feature_size, generator=torch.Generator().manual_seed(seed)) / 2


def run(head: DraftHead, step: HeadStep, rounds: list[list[int]], count: int) -> list[list[np.ndarray[Any, Any]]]:
    """For each round and guess the logits of three sequences that get so many rows in it."""
    cache = HeadCache(head.config.layer.num_kv_heads, head.config.layer.head_dim, CAPACITY)
    slots = [cache.take() for _ in STARTS]
    index = np.array([slot.index for slot in slots])
    found = []
    for number, lengths in enumerate(rounds):
        features = [features_of(head, length, 10 * number + n) for n, length in enumerate(lengths)]
        token_ids = np.arange(sum(lengths)) * 7 % TARGET.vocab_size
        at = np.concatenate(
            [np.arange(n) + first + slot.rows for n, first, slot in zip(lengths, STARTS, slots, strict=True)]
        )
        cu_seqlens, kept = np.cumsum([0, *lengths]), np.array([slot.rows for slot in slots])
        guess = step(HeadRows(head.fuse(torch.cat(features)), token_ids, at, cu_seqlens, index, kept), cache.pool)
        for slot, length in zip(slots, lengths, strict=True):
            slot.rows += length
        logits = [guess.logits.copy()]
        ends = np.array([first + slot.rows for first, slot in zip(STARTS, slots, strict=True)])
        for place in range(count - 1):
            ids = head.draft_ids.numpy()[guess.best]
            kept = np.array([slot.rows for slot in slots]) + place
            guess = step(HeadRows(guess.hidden.contiguous(), ids, ends + place, np.arange(4), index, kept), cache.pool)
            logits.append(guess.logits.copy())
        found.append(logits)
    return found


ROUNDS = [[5, 1, 9], [1, 2, 1], [3, 1, 4]]


def test_torch_step_is_the_chain_of_each_sequence_alone(head: DraftHead) -> None:
    found = run(head, TorchHeadStep(head), ROUNDS, 3)
    for n, first in enumerate(STARTS):
        cache = DraftCache(head, CAPACITY, first)
        for number, lengths in enumerate(ROUNDS):
            before = sum(lengths[:n])
            ids = torch.arange(before, before + lengths[n]) * 7 % TARGET.vocab_size
            chain = draft_chain(head, cache, features_of(head, lengths[n], 10 * number + n), ids, 3)
            ours = np.stack([logits[n] for logits in found[number]])
            np.testing.assert_allclose(ours, chain.logits.numpy(), atol=0.01, rtol=1e-3)


@pytest.mark.skipif(not is_native(), reason="no native kernels here")
def test_native_step_is_the_torch_step_but_for_eight_bits(head: DraftHead) -> None:
    native = make_head_step(head, 400, lambda: 2)
    assert isinstance(native, NativeHeadStep)
    head.lm_head = expand(group_in_4_bits(head.lm_head))
    for ours, twins in zip(run(head, native, ROUNDS, 1), run(head, TorchHeadStep(head), ROUNDS, 1), strict=True):
        error = np.abs(ours[0] - twins[0]).max()
        assert error < 0.05 * np.abs(twins[0]).max()


@pytest.mark.skipif(not is_native(), reason="no native kernels here")
def test_native_step_gives_a_sequence_the_same_beside_others_and_on_any_threads(head: DraftHead) -> None:
    one, two = (run(head, make_head_step(head, 400, lambda n=n: n), ROUNDS, 3) for n in (1, 2))  # type: ignore[misc]
    for ours, theirs in zip(one, two, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_sizes_that_the_kernel_does_not_take_get_the_torch_step() -> None:
    assert isinstance(make_head_step(random_head("ours", tiny_config()), 100, lambda: 1), TorchHeadStep)


def test_cache_keeps_the_newer_half_where_it_is_full_and_grows_by_slots() -> None:
    cache = HeadCache(2, 16, 8)
    slots = [cache.take() for _ in range(FIRST_SLOTS + 1)]
    assert len({slot.index for slot in slots}) == FIRST_SLOTS + 1 == cache.num_taken
    slot = slots[-1]
    cache.pool[slot.index, 0, :] = torch.arange(8.0).view(1, 8, 1, 1)
    slot.rows = 7
    cache.make_room(slot, 1)
    assert slot.rows == 7
    cache.make_room(slot, 3)
    assert slot.rows == 4
    assert cache.pool[slot.index, 0, :, :4, 0, 0].tolist() == [[3.0, 4.0, 5.0, 6.0]] * 2
    for slot in slots:
        cache.give_back(slot)
    assert cache.num_taken == 0
