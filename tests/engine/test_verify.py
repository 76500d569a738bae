"""Drafts against the sampler that draws one token after the other."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import InternalError
from penstock.core.ids import AttemptKey
from penstock.engine import verify
from penstock.engine.draft_tree import ROOT, depths, path_of
from penstock.engine.interface import ScheduledSeq
from penstock.engine.sampler import SampledRow, sample
from penstock.engine.sequence import Sequence
from penstock.engine.verify import draw
from penstock.kernels.decoder_step.op import likeliest
from penstock.protocol.messages import SampledToken
from penstock.protocol.sampling import SamplingParams

VOCAB = 12
EOS = frozenset({0})
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(64),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    min_tokens=st.sampled_from([0, 4]),
    logprobs=st.sampled_from([None, 2]),
    logit_bias=st.sampled_from([{}, {3: 2.0}]),
    seed=st.integers(0, 1000),
)


def sequence(params: SamplingParams, output: list[int] | None = None) -> Sequence:
    prompt = [1, 2, 3]
    seq = Sequence(AttemptKey("r", 0), 0, prompt, params, b"", 0.0, 1.0, output or [])
    seq.num_computed_tokens = seq.num_tokens - 1
    return seq


def logits_of(ids: tuple[int, ...], seed: int) -> torch.Tensor:
    """What a network might say behind these tokens."""
    generator = torch.Generator().manual_seed(hash((ids, seed)) % (1 << 40))
    return torch.randn(VOCAB, generator=generator) * 2


def plain(seq: Sequence, count: int, seed: int) -> list[SampledToken]:
    """`count` tokens behind `seq`, a step each."""
    copy = sequence(seq.params, list(seq.output_ids))
    tokens: list[SampledToken] = []
    for _ in range(count):
        logits = logits_of((*copy.prompt_ids, *copy.output_ids), seed)[None]
        tokens += sample(likeliest(logits), [SampledRow(0, copy, 0)], EOS)
        copy.output_ids.append(tokens[-1].token_id)
    return tokens


def rows_of(seq: Sequence, draft: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    known = (*seq.prompt_ids, *seq.output_ids)
    return [logits_of(known + draft[:place], seed) for place in range(len(draft) + 1)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(PARAMS, st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4), st.integers(0, 99))
def test_a_draft_gives_the_tokens_of_plain_steps(many: list[tuple[SamplingParams, int, int]], seed: int) -> None:
    """Each draft is right for a while, then wrong; whatever stands beside it in the batch."""
    batch: list[ScheduledSeq] = []
    logits: list[torch.Tensor] = []
    expected: list[list[SampledToken]] = []
    for number, (params, length, right) in enumerate(many):
        seq = sequence(params, [4] * number)
        steps = plain(seq, length + 1, seed)
        ids = [token.token_id for token in steps]
        draft = tuple(ids[at] if at < right else (ids[at] + 1) % VOCAB for at in range(length))
        batch.append(ScheduledSeq(seq, 1, draft))
        logits += rows_of(seq, draft, seed)
        expected.append(steps[: min(right, length) + 1])
    found = draw(likeliest(torch.stack(logits)), batch, EOS)
    for tokens, steps in zip(found, expected, strict=True):
        assert [token.token_id for token in tokens] == [token.token_id for token in steps]
        for token, step in zip(tokens, steps, strict=True):
            assert (token.logprob is None) == (step.logprob is None)
            if token.logprob is not None and step.logprob is not None:
                assert token.logprob.logprob == pytest.approx(step.logprob.logprob, abs=1e-5)


def random_tree(rng: random.Random, count: int, right: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens and parents: now and then a token is the one that is right there."""
    draft: list[int] = []
    parents: list[int] = []
    for token in range(count):
        parents.append(rng.randrange(ROOT, token))
        depth = depths(parents)[-1]
        beside = {draft[at] for at in range(token) if parents[at] == parents[-1]}
        wanted = right[depth] if rng.random() < 0.6 else rng.randrange(VOCAB)
        draft.append(wanted if wanted not in beside else min(set(range(VOCAB)) - beside))
    return tuple(draft), tuple(parents)


def tree_rows(seq: Sequence, draft: tuple[int, ...], parents: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    known = (*seq.prompt_ids, *seq.output_ids)
    behind: list[tuple[int, ...]] = []
    for token, parent in zip(draft, parents, strict=True):
        behind.append((*(known if parent == ROOT else behind[parent]), token))
    return [logits_of(ids, seed) for ids in (known, *behind)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(PARAMS, st.integers(0, 10)), min_size=1, max_size=4), st.integers(0, 999))
def test_a_tree_gives_the_tokens_of_plain_steps(many: list[tuple[SamplingParams, int]], seed: int) -> None:
    rng = random.Random(seed)
    batch: list[ScheduledSeq] = []
    logits: list[torch.Tensor] = []
    expected: list[list[SampledToken]] = []
    for number, (params, count) in enumerate(many):
        seq = sequence(params, [4] * number)
        steps = plain(seq, count + 1, seed)
        ids = [token.token_id for token in steps]
        draft, parents = random_tree(rng, count, ids)
        batch.append(ScheduledSeq(seq, 1, draft, parents))
        logits += tree_rows(seq, draft, parents, seed)
        expected.append(steps[: len(path_of(draft, parents, ids)) + 1])
    found = draw(likeliest(torch.stack(logits)), batch, EOS)
    for tokens, steps in zip(found, expected, strict=True):
        assert [token.token_id for token in tokens] == [token.token_id for token in steps]
        assert [token.logprob is None for token in tokens] == [step.logprob is None for step in steps]


def test_rows_of_branches_not_taken_are_not_looked_at() -> None:
    seq = sequence(SamplingParams(max_tokens=9, temperature=0))
    first, second, third = (token.token_id for token in plain(seq, 3, 0))
    draft, parents = ((first + 1) % VOCAB, first, 7, second), (-1, -1, 0, 1)
    rows = tree_rows(seq, draft, parents, 0)
    rows[1][:] = rows[3][:] = torch.nan
    (tokens,) = draw(likeliest(torch.stack(rows)), [ScheduledSeq(seq, 1, draft, parents)], EOS)
    assert [token.token_id for token in tokens] == [first, second, third]


def test_entries_that_do_not_sample_and_several_choices_stand_beside_drafts() -> None:
    chunk, many, one = (sequence(SamplingParams(max_tokens=9, seed=n, n=3 if n == 1 else 1)) for n in range(3))
    chunk.num_computed_tokens = 0
    many.sample_choices = (0, 1, 2)
    rows = [logits_of((1, 2, 3), 5), *rows_of(one, (7,), 5)]
    batch = [ScheduledSeq(chunk, 2), ScheduledSeq(many, 1), ScheduledSeq(one, 1, (7,))]
    nothing, three, drafted = draw(likeliest(torch.stack(rows)), batch, EOS)
    assert (len(nothing), len(three)) == (0, 3)
    assert drafted[0].token_id == plain(one, 1, 5)[0].token_id


def test_rows_behind_a_wrong_token_are_not_looked_at() -> None:
    seq = sequence(SamplingParams(max_tokens=9, temperature=0))
    right = plain(seq, 1, 0)[0].token_id
    rows = rows_of(seq, ((right + 1) % VOCAB, 5), 0)
    rows[1][:] = torch.nan
    (tokens,) = draw(likeliest(torch.stack(rows)), [ScheduledSeq(seq, 1, ((right + 1) % VOCAB, 5))], EOS)
    assert [token.token_id for token in tokens] == [right]
    rows[0][:] = torch.nan
    with pytest.raises(InternalError, match="no token can be drawn"):
        draw(likeliest(torch.stack(rows)), [ScheduledSeq(seq, 1, (5, 5))], EOS)


# ---- the distribution ----

DRAWS = 24_000
WEIGHTS = torch.tensor([0.32, 0.22, 0.15, 0.11, 0.08, 0.05, 0.03, 0.02, 0.01, 0.005, 0.003, 0.002])
CRITICAL = 31.26  # of chi-square with 11 degrees of freedom, at 0.001


def second_tokens(num_draws: int) -> np.ndarray:
    """How often each token is the second of a stream, of streams whose step had the likeliest token as draft."""
    counts = np.zeros(VOCAB)
    logits = likeliest(torch.stack([WEIGHTS.log()] * 2 + [WEIGHTS.flip(0).log()]))
    for seed in range(num_draws):
        seq = sequence(SamplingParams(max_tokens=9, seed=seed))
        (tokens,) = draw(logits, [ScheduledSeq(seq, 1, (0, 3))], EOS)
        if len(tokens) == 1:  # the draft was refused: a step of its own follows
            seq.output_ids.append(tokens[0].token_id)
            seq.num_computed_tokens += 1
            tokens += draw(logits, [ScheduledSeq(seq, 1)], EOS)[0]
        counts[tokens[1].token_id] += 1
    return counts


def chi_square(counts: np.ndarray) -> float:
    expected = WEIGHTS.double().numpy() / float(WEIGHTS.double().sum()) * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_tokens_of_drafted_streams_have_the_distribution_of_the_model() -> None:
    assert chi_square(second_tokens(DRAWS)) < CRITICAL


def test_the_chi_square_test_notices_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that lets one refused draft in twenty pass."""
    honest = verify._Draws.take

    def take(draws: verify._Draws, token: SampledToken) -> None:
        draft, place = draws.entry.draft, len(draws.tokens)
        lets_pass = place < len(draft) and draws.entry.seq.params.seed % 20 == 0
        honest(draws, SampledToken(draft[place]) if lets_pass else token)

    monkeypatch.setattr(verify._Draws, "take", take)
    assert chi_square(second_tokens(DRAWS)) > CRITICAL
