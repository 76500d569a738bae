"""The unrolling of training is what drafting does, and what is measured over it is what chains would have given."""

from __future__ import annotations

import random

import pytest
import torch

from penstock.models.draft_chain import DraftCache, draft_chain
from penstock.models.draft_config import head_config
from penstock.models.draft_head import DraftHead
from penstock.testing.tiny_model import tiny_config
from penstock.training.batches import plain_batches
from penstock.training.evaluation import measure_acceptance
from penstock.training.features import Example
from penstock.training.generation import Sample
from penstock.training.initial import initial_weights
from penstock.training.unroll import Rows, unroll

TARGET = tiny_config(vocab_size=24)
WIDTH = TARGET.hidden_size


@pytest.fixture(scope="module")
def head() -> DraftHead:
    generator = torch.Generator().manual_seed(1)
    config = head_config(TARGET, 20, 64)
    fc = torch.randn(WIDTH, 2 * WIDTH, generator=generator) / WIDTH**0.5
    weights = {name: w.detach() * 2 for name, w in initial_weights(config, fc, seed=3).items()}
    draft_ids = torch.arange(2, 22)
    ends = torch.randn(2, TARGET.vocab_size, WIDTH, generator=generator)
    return DraftHead(config, weights, ends[0], ends[1][draft_ids], draft_ids)


def example(length: int, answer: int, number: int = 0) -> Example:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, TARGET.vocab_size, (length,), generator=generator).tolist()
    features = torch.randn(length, WIDTH, generator=generator)
    final = torch.randn(length, WIDTH, generator=generator)
    return Example(Sample(number, 0.0, ids[:-answer], ids[-answer:]), features, final)


def test_first_step_is_the_whole_sequence(head: DraftHead) -> None:
    one = example(9, 4)
    features, token_ids = one.features[None, :-1], torch.tensor([one.sample.token_ids[1:]])
    (output,) = unroll(head, Rows(features, token_ids, torch.zeros(1, dtype=torch.int64)), 1)
    torch.testing.assert_close(output, head.forward(features, token_ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", [0, 3])
def test_step_j_is_the_jth_guess_of_a_chain_fed_with_the_samples_tokens(head: DraftHead, first: int) -> None:
    length, num_steps = 11, 4
    one = example(length, 5)
    token_ids = torch.tensor(one.sample.token_ids[1:])
    rows = Rows(one.features[None, :-1], token_ids[None], torch.tensor([first]))
    outputs = [output[0] for output in unroll(head, rows, num_steps)]
    for start in range(first, length - num_steps):
        hidden = head.fuse(one.features[first : start + 1])
        for step in range(num_steps):
            stop = start + step + 1
            entrance = head.enter(hidden, token_ids[first:stop], torch.arange(first, stop))
            q, k, v = (x.transpose(0, 1) for x in (entrance.q, entrance.k, entrance.v))
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            expected = head.leave(entrance.residual, attended.transpose(0, 1))[-1]
            torch.testing.assert_close(outputs[step][stop - 1], expected, atol=1e-4, rtol=1e-4)
            hidden = torch.cat((hidden, expected[None]))


@pytest.mark.parametrize("skips_prompt", [False, True])
def test_acceptance_is_what_chains_give_one_behind_the_other(head: DraftHead, skips_prompt: bool) -> None:
    """Samples whose answers follow the head's own guesses in part, so that chains of every length are accepted."""
    rng = random.Random(0)
    examples = [foreseen(head, length, answer, rng, skips_prompt) for length, answer in ((40, 30), (25, 9), (12, 2))]
    measured = measure_acceptance(head, plain_batches(examples, 64, skips_prompt), 3)
    counted = sum(len(example.sample.output_ids) - 1 for example in examples)
    assert measured.num_tokens == counted
    for chain in (1, 2, 3):
        steps = sum(serve(head, example, chain, skips_prompt) for example in examples)
        assert measured.tokens_per_step[chain - 1] == pytest.approx(counted / steps, abs=1e-4)
    assert measured.tokens_per_step[2] > 1.3
    assert all(0 < rate < 1 for rate in measured.position_rates)


def cache_of(head: DraftHead, one: Example, skips_prompt: bool) -> tuple[DraftCache, int]:
    start = len(one.sample.prompt_ids) - 1 if skips_prompt else 0
    return DraftCache(head, one.num_tokens + 4, start), start


def foreseen(head: DraftHead, length: int, answer: int, rng: random.Random, skips_prompt: bool) -> Example:
    """An example whose answer is rewritten, token by token, to what the head guesses four times out of five."""
    one = example(length, answer)
    ids, at = list(one.sample.token_ids), length - answer
    while at + 1 < length:
        cache, start = cache_of(head, one, skips_prompt)
        chain = draft_chain(head, cache, one.features[start:at], torch.tensor(ids[start + 1 : at + 1]), 3)
        for guess in chain.token_ids[: length - at - 1]:
            at += 1
            ids[at] = guess if rng.random() < 0.8 else rng.randrange(TARGET.vocab_size)
            if ids[at] != guess:
                break
    return Example(Sample(0, 0.0, ids[:-answer], ids[-answer:]), one.features, one.final)


def serve(head: DraftHead, one: Example, chain: int, skips_prompt: bool) -> int:
    """Steps of a target that says `one`'s answer and verifies chains; its first token comes from the prompt."""
    ids, at, steps = one.sample.token_ids, len(one.sample.prompt_ids), 0
    cache, start = cache_of(head, one, skips_prompt)
    while at + 1 < len(ids):
        rows = slice(start + cache.num_rows, at)
        features, token_ids = one.features[rows], torch.tensor(ids[rows.start + 1 : at + 1])
        guesses = draft_chain(head, cache, features, token_ids, chain).token_ids
        said = ids[at + 1 : at + 1 + chain]
        accepted = next((i for i, (a, b) in enumerate(zip(guesses, said, strict=False)) if a != b), len(said))
        at += accepted + 1
        steps += 1
    return steps
