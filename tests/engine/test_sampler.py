"""The sampler against a slow twin that takes one row at a time and sorts it in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import InternalError
from penstock.core.ids import AttemptKey
from penstock.core.random_bits import choice_seed
from penstock.engine import sampler
from penstock.engine.race import arrival_times, race_key
from penstock.engine.sampler import SampledRow
from penstock.engine.sequence import Sequence
from penstock.kernels.decoder_step.op import likeliest
from penstock.protocol.messages import SampledToken
from penstock.protocol.sampling import SamplingParams

EOS = frozenset({0})


def sample(logits: torch.Tensor, rows: list[SampledRow], eos_token_ids: frozenset[int]) -> list[SampledToken]:
    return sampler.sample(likeliest(logits), rows, eos_token_ids)


def row(
    params: SamplingParams, index: int = 0, choice: int = 0, output: tuple[int, ...] = (), name: str = "r"
) -> SampledRow:
    seq = Sequence(AttemptKey(name, 0), choice, [1, 2, 3], params, b"", 0.0, 1.0, list(output))
    return SampledRow(index, seq, choice)


def draw_logits(rows: int, vocab_size: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def kept_probabilities(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """What each token may be drawn with, by the plain definition of each filter; float64."""
    scaled = logits.double().numpy() / max(params.temperature, 1e-5)
    probabilities = np.exp(scaled - scaled.max())
    kept = np.ones(len(scaled), dtype=bool)
    in_order = np.sort(scaled)[::-1]
    if params.top_k:
        kept &= scaled >= in_order[min(params.top_k, len(scaled)) - 1]
    if params.top_p < 1:
        ranked = np.sort(np.where(kept, probabilities, 0))[::-1]
        share = ranked.cumsum() / ranked.sum()
        kept &= probabilities >= ranked[np.argmax(share >= params.top_p)]
    kept &= probabilities >= params.min_p
    probabilities = np.where(kept, probabilities, 0)
    return probabilities / probabilities.sum()


def assert_drawn_right(token_id: int, logits: torch.Tensor, one: SampledRow) -> None:
    """No other token arrives before it, up to float32 rounding."""
    probabilities = kept_probabilities(logits, one.params)
    assert probabilities[token_id] > 0
    key = race_key(choice_seed(one.params.seed, one.choice), len(one.seq.output_ids))
    speeds = probabilities / arrival_times(key, len(probabilities)).astype(np.float64)
    assert speeds[token_id] >= speeds.max() * (1 - 1e-4)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 200, 10_000]),
    top_p=st.sampled_from([1.0, 1.0, 0.01, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**63 - 1),
)


@settings(max_examples=200, deadline=None)
@given(
    many=st.lists(st.tuples(PARAMS, st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=6),
    vocab_size=st.sampled_from([3, 100, 256, 700]),
    seed=st.integers(0, 10_000),
)
def test_draw_agrees_with_the_slow_twin(
    many: list[tuple[SamplingParams, int, int]], vocab_size: int, seed: int
) -> None:
    logits = draw_logits(len(many), vocab_size, seed)
    rows = [row(params, i, choice, (5,) * length) for i, (params, choice, length) in enumerate(many)]
    for token, one, own in zip(sample(logits, rows, EOS), rows, logits, strict=True):
        assert_drawn_right(token.token_id, own, one)


@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0])
def test_flat_rows_are_sorted_as_a_whole(spread: float) -> None:
    logits = draw_logits(3, 5000, spread=spread)
    rows = [row(SamplingParams(top_p=0.95, top_k=k, seed=i), i) for i, k in enumerate((0, 3000, 100))]
    for token, one, own in zip(sample(logits, rows, EOS), rows, logits, strict=True):
        assert_drawn_right(token.token_id, own, one)


def test_row_does_not_depend_on_its_neighbours() -> None:
    logits = draw_logits(7, 3000, spread=2.0)
    many = [
        SamplingParams(temperature=0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.9),
        SamplingParams(seed=3, top_k=20, logprobs=3),
        SamplingParams(seed=4, top_p=0.9999, temperature=5.0),
        SamplingParams(seed=5, min_p=0.1, repetition_penalty=1.5),
        SamplingParams(temperature=0, logprobs=0, min_tokens=3),
    ]
    together = sample(logits, [row(params, i) for i, params in enumerate(many)], EOS)
    alone = [sample(logits, [row(params, i)], EOS)[0] for i, params in enumerate(many)]
    assert together == alone


def test_greedy_takes_the_first_of_the_highest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 4.0, 4.0, 5.0]])
    rows = [row(SamplingParams(temperature=0), i) for i in range(2)]
    assert [token.token_id for token in sample(logits, rows, EOS)] == [1, 0]
    assert all(token.logprob is None for token in sample(logits, rows, EOS))


def test_greedy_does_not_look_at_the_filters() -> None:
    logits = draw_logits(1, 50)
    params = SamplingParams(temperature=0, top_k=3, top_p=0.1, min_p=0.5, seed=9)
    assert sample(logits, [row(params)], EOS)[0].token_id == int(logits.argmax())


def test_choices_share_a_row_and_draw_with_their_own_seeds() -> None:
    logits = draw_logits(2, 500, spread=0.5)
    params = SamplingParams(n=4, seed=11)
    rows = [row(params, 1, choice) for choice in range(4)]
    tokens = [token.token_id for token in sample(logits, rows, EOS)]
    assert len(set(tokens)) > 1
    for token_id, one in zip(tokens, rows, strict=True):
        assert_drawn_right(token_id, logits[1], one)


def test_same_seed_draws_the_same_and_the_next_index_another() -> None:
    logits = draw_logits(1, 20_000, spread=0.1)
    params = SamplingParams(seed=77)
    tokens = [sample(logits, [row(params, output=(4,) * n)], EOS)[0].token_id for n in (0, 0, 1, 2)]
    assert tokens[0] == tokens[1]
    assert len(set(tokens[1:])) == 3


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([0.7, 0.2, 0.0999, 0.0001]).log().repeat(4000, 1)
    rows = [row(SamplingParams(seed=i), i) for i in range(4000)]
    counts = np.bincount([token.token_id for token in sample(logits, rows, EOS)], minlength=4)
    assert abs(counts / 4000 - [0.7, 0.2, 0.1, 0]).max() < 0.03


def test_token_of_no_weight_is_never_drawn() -> None:
    logits = torch.full((2000, 600), -torch.inf)
    logits[:, [3, 299, 300, 598]] = 0.0
    rows = [row(SamplingParams(seed=i), i) for i in range(2000)]
    assert {token.token_id for token in sample(logits, rows, EOS)} == {3, 299, 300, 598}


def test_top_p_keeps_no_more_than_it_needs() -> None:
    logits = torch.tensor([[0.0, -40.0, -50.0, -60.0]])
    rows = [row(SamplingParams(seed=i, top_p=0.9, temperature=40.0)) for i in range(200)]
    (probabilities,) = torch.softmax(logits / 40, -1).tolist()
    assert probabilities[0] + probabilities[1] + probabilities[2] < 0.9 < 1
    assert {token.token_id for token in sample(logits, rows, EOS)} == {0, 1, 2, 3}
    rows = [row(SamplingParams(seed=i, top_p=0.6, temperature=40.0)) for i in range(200)]
    assert probabilities[0] < 0.6 < probabilities[0] + probabilities[1]
    assert {token.token_id for token in sample(logits, rows, EOS)} == {0, 1}


def test_tiny_temperature_is_greedy_and_finite() -> None:
    logits = draw_logits(1, 100)
    params = SamplingParams(temperature=1e-300, seed=5)
    assert sample(logits, [row(params)], EOS)[0].token_id == int(logits.argmax())


def test_ties_with_the_cutoff_are_all_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    rows = [row(SamplingParams(seed=i, top_k=2), 0) for i in range(300)]
    assert {token.token_id for token in sample(logits, rows, EOS)} == {0, 1, 2, 3}


def logprob_of(token: SampledToken) -> tuple[float, list[tuple[int, float]]]:
    assert token.logprob is not None
    return token.logprob.logprob, list(token.logprob.top)


def test_logprobs_are_the_models_own() -> None:
    logits = draw_logits(2, 400)
    expected = torch.log_softmax(logits.double(), dim=-1)
    params = SamplingParams(temperature=0.3, top_k=5, logit_bias={7: 50.0}, repetition_penalty=2.0, seed=2, logprobs=4)
    tokens = sample(logits, [row(params, 0), row(SamplingParams(logprobs=0, temperature=0), 1)], EOS)
    assert tokens[0].token_id == 7
    chosen, top = logprob_of(tokens[0])
    assert chosen == pytest.approx(float(expected[0, 7]), abs=1e-5)
    best = expected[0].topk(4)
    assert [token_id for token_id, _ in top] == best.indices.tolist()
    assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-5)
    chosen, top = logprob_of(tokens[1])
    assert chosen == pytest.approx(float(expected[1].max()), abs=1e-5)
    assert top == []


def test_more_logprobs_than_tokens_gives_what_there_is() -> None:
    (token,) = sample(draw_logits(1, 3), [row(SamplingParams(logprobs=20, temperature=0))], EOS)
    assert len(logprob_of(token)[1]) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_row_is_named(value: float, temperature: float) -> None:
    logits = draw_logits(3, 50)
    logits[1, 20] = value
    rows = [row(SamplingParams(temperature=temperature), i, name=f"request-{i}") for i in range(3)]
    with pytest.raises(InternalError, match="request-1#0: the highest logit is"):
        sample(logits, rows, EOS)
    assert len(sample(logits, [rows[0], rows[2]], EOS)) == 2


def test_row_with_every_token_masked_is_named() -> None:
    params = SamplingParams(min_tokens=1, stop_token_ids=(1, 2))
    with pytest.raises(InternalError, match="no token can be drawn"):
        sample(draw_logits(1, 3), [row(params)], EOS)


def test_bfloat16_logits_and_no_rows_are_fine() -> None:
    logits = draw_logits(1, 30).bfloat16()
    assert sample(logits, [row(SamplingParams(temperature=0))], EOS)[0].token_id == int(logits.argmax())
    assert sample(logits[:0], [], EOS) == []
