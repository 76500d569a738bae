from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from penstock.core.errors import InternalError
from penstock.core.ids import AttemptKey
from penstock.core.random_bits import philox4x32
from penstock.engine import race
from penstock.engine.sampler import SampledRow, sample
from penstock.engine.sequence import Sequence
from penstock.kernels.decoder_step.op import likeliest
from penstock.kernels.logits import reference
from penstock.kernels.logits.op import draw_tokens
from penstock.kernels.logits.rows import Bias, Drawn, Penalties, SamplingRows, count_uses
from penstock.protocol.sampling import SamplingParams
from penstock.tests.kernels.on_triton import DEVICE, DTYPES, assert_close, randn, run

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested")

import triton.language as tl  # noqa: E402

from penstock.kernels.logits.race import arrival_times, philox  # noqa: E402


def array(values: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def sampling_rows(params: list[SamplingParams], indices: list[int]) -> SamplingRows:
    return SamplingRows(
        seeds=array([p.seed for p in params], torch.int64),
        indices=array(indices, torch.int64),
        temperature=array([p.temperature for p in params]),
        top_k=array([p.top_k for p in params], torch.int32),
        top_p=array([p.top_p for p in params]),
        min_p=array([p.min_p for p in params]),
        num_top=array([-1 if p.logprobs is None else p.logprobs for p in params], torch.int32),
    )


def bias_of(params: list[SamplingParams]) -> Bias:
    entries = [sorted(p.logit_bias.items()) for p in params]
    starts = np.cumsum([0, *map(len, entries)]).tolist()
    flat = [entry for some in entries for entry in some]
    ids = array([token for token, _ in flat], torch.int32)
    return Bias(array(starts, torch.int32), ids, array([amount for _, amount in flat]))


def penalties_of(params: list[SamplingParams], prompts, outputs, vocab_size: int) -> Penalties:
    """States in the reverse order of the rows; a row without penalties has none."""
    uses = torch.stack([count_uses(p, o, vocab_size) for p, o in zip(prompts, outputs, strict=True)]).flip(0)
    states = [len(params) - 1 - n if p.has_penalties else -1 for n, p in enumerate(params)]
    return Penalties(
        uses.contiguous().to(DEVICE),
        array(states, torch.int32),
        array([p.repetition_penalty for p in params]),
        array([p.presence_penalty for p in params]),
        array([p.frequency_penalty for p in params]),
    )


def on_cpu(value):
    return value and type(value)(*(getattr(value, name).cpu().clone() for name in value.__slots__))


def assert_equal_draws(actual: Drawn, expected: Drawn) -> None:
    assert actual.token_ids.tolist() == expected.token_ids.tolist()
    assert actual.top_ids.tolist() == expected.top_ids.tolist()
    assert torch.equal(actual.logprobs.cpu().isnan(), expected.logprobs.isnan())
    assert_close(actual.logprobs.nan_to_num(7), expected.logprobs.nan_to_num(7))
    assert_close(actual.top_logprobs.nan_to_num(7), expected.top_logprobs.nan_to_num(7))


MANY = [
    SamplingParams(temperature=0, logprobs=3),
    SamplingParams(seed=5),
    SamplingParams(seed=2**63 - 1, temperature=0.7, top_k=3, logprobs=0),
    SamplingParams(seed=11, top_p=0.5, logprobs=5),
    SamplingParams(seed=12, top_k=40, top_p=0.9, temperature=1.5),
    SamplingParams(seed=13, min_p=0.05, logprobs=1),
    SamplingParams(seed=14, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.3),
    SamplingParams(seed=15, presence_penalty=1.5, frequency_penalty=0.3, logit_bias={3: 5.0, 0: -100.0}),
    SamplingParams(seed=16, temperature=0.01, repetition_penalty=0.5, logprobs=2),
    SamplingParams(temperature=0, logit_bias={1: 100.0}, frequency_penalty=-2.0),
]
OUTPUTS = [[n % 3, 1, 1][: n % 4] for n in range(len(MANY))]
PROMPTS = [[0, 2, 2, n] for n in range(len(MANY))]


@pytest.mark.parametrize("vocab_size", [11, 1500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(vocab_size: int, dtype: torch.dtype) -> None:
    logits = (3 * randn(len(MANY), vocab_size + 5)).to(dtype)[:, 2:-3]
    rows, bias = sampling_rows(MANY, [len(o) for o in OUTPUTS]), bias_of(MANY)
    penalties = penalties_of(MANY, PROMPTS, OUTPUTS, vocab_size)
    own = on_cpu(penalties)
    expected = reference.draw_tokens(logits.cpu(), on_cpu(rows), on_cpu(bias), own, 5)
    assert_equal_draws(run(draw_tokens, logits, rows, bias, penalties, 5), expected)
    assert torch.equal(penalties.uses.cpu(), own.uses)


@pytest.mark.parametrize("vocab_size", [11, 1500])
def test_equals_the_sampler_of_the_engine(vocab_size: int) -> None:
    logits = 3 * randn(len(MANY), vocab_size, seed=4)
    seqs = [
        Sequence(AttemptKey("r", 0), 0, prompt, params, b"", 0.0, 1.0, list(output))
        for params, prompt, output in zip(MANY, PROMPTS, OUTPUTS, strict=True)
    ]
    expected = sample(likeliest(logits), [SampledRow(n, seq, 0) for n, seq in enumerate(seqs)], frozenset())
    rows, penalties = sampling_rows(MANY, list(map(len, OUTPUTS))), penalties_of(MANY, PROMPTS, OUTPUTS, vocab_size)
    drawn = run(draw_tokens, logits, rows, bias_of(MANY), penalties, 5)
    assert drawn.token_ids.tolist() == [token.token_id for token in expected]
    for n, token in enumerate(expected):
        if token.logprob is None:
            assert drawn.logprobs[n].isnan()
            continue
        assert drawn.logprobs[n].item() == pytest.approx(token.logprob.logprob, abs=1e-5)
        ids = drawn.top_ids[n].tolist()
        assert ids[: len(token.logprob.top)] == [token_id for token_id, _ in token.logprob.top]
        assert set(ids[len(token.logprob.top) :]) <= {-1}


def test_many_draws_equal_the_reference() -> None:
    """Without bias and penalties, where the logits are read as they are."""
    params = [SamplingParams(seed=n, top_k=n % 7, top_p=1 - n % 5 / 10, min_p=n % 3 / 20) for n in range(40)]
    logits, rows = 2 * randn(40, 130, seed=9), sampling_rows(params, list(range(40)))
    expected = reference.draw_tokens(logits.cpu(), on_cpu(rows), None, None, 0)
    assert_equal_draws(run(draw_tokens, logits, rows), expected)
    assert len(set(expected.token_ids.tolist())) > 15


def test_ties_with_the_cutoff_are_all_kept() -> None:
    params = [SamplingParams(seed=n, top_k=2) for n in range(60)]
    logits = array([5.0, 4.0, 4.0, 4.0, 1.0]).repeat(60, 1)
    drawn = run(draw_tokens, logits, sampling_rows(params, [0] * 60)).token_ids
    assert set(drawn.tolist()) == {0, 1, 2, 3}


def test_greedy_takes_the_first_of_the_highest_across_tiles() -> None:
    logits = torch.zeros(1, 3000, device=DEVICE)
    logits[0, [1100, 2500]] = 2.0
    drawn = run(draw_tokens, logits, sampling_rows([SamplingParams(temperature=0, logprobs=3)], [0]), most_top=3)
    assert drawn.token_ids.tolist() == [1100]
    assert drawn.top_ids.tolist() == [[1100, 2500, 0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_row_without_a_finite_maximum_draws_none(bad: float) -> None:
    logits = torch.zeros(3, 1300, device=DEVICE)
    logits[1, 1200] = bad
    logits[2] = -torch.inf
    drawn = run(draw_tokens, logits, sampling_rows([SamplingParams(seed=1, logprobs=2)] * 3, [0] * 3), most_top=2)
    assert drawn.token_ids[1:].tolist() == [-1, -1]
    assert drawn.token_ids[0] >= 0
    assert drawn.top_ids[1:].tolist() == [[-1, -1]] * 2


def test_forbidden_token_is_not_drawn() -> None:
    """A bias of -inf, which no request may ask for, is how a minimum length is kept."""
    params = [SamplingParams(seed=n) for n in range(20)]
    logits = array([9.0, 1.0, 1.0]).repeat(20, 1)
    bias = Bias(array(list(range(21)), torch.int32), array([0] * 20, torch.int32), array([-torch.inf] * 20))
    assert 0 not in run(draw_tokens, logits, sampling_rows(params, [0] * 20), bias).token_ids.tolist()


@triton.jit
def _times(words, times, seed, index, SIZE: tl.constexpr):
    token = tl.arange(0, SIZE)
    w0, w1, w2, w3 = philox(tl.load(seed), tl.load(index))
    tl.store(words, w0.to(tl.int64))
    tl.store(words + 1, w1.to(tl.int64))
    tl.store(words + 2, w2.to(tl.int64))
    tl.store(words + 3, w3.to(tl.int64))
    tl.store(times + token, arrival_times(token, w0, w1, w2, w3))


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (2**63 - 1, 2**33 + 7), (123456789012345, 42)])
def test_random_numbers_are_those_of_the_engine(seed: int, index: int) -> None:
    words, times = torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.zeros(4096, device=DEVICE)
    _times[(1,)](words, times, array([seed], torch.int64), array([index], torch.int64), SIZE=4096)
    key = race.race_key(seed, index)
    assert tuple(words.tolist()) == key == reference.draw_words(seed, index)
    expected = race.arrival_times(key, 4096)
    np.testing.assert_allclose(reference.arrival_times(key, 4096).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(times.cpu().numpy(), expected, rtol=1e-6)
    assert philox4x32((1, 2, 3, 4), (5, 6)) != key


def test_count_of_uses() -> None:
    assert count_uses([1, 1, 3], [3, 3, 0], 5).tolist() == [2, 1, 0, 5, 0]


LOGITS = torch.zeros(2, 5)
ROWS = SamplingRows(*(torch.zeros(2, dtype=torch.int64),) * 2, *(torch.zeros(2),) * 5)
ROWS = replace(ROWS, top_k=ROWS.top_k.int(), num_top=ROWS.num_top.int())


@pytest.mark.parametrize(
    ("logits", "rows", "more", "message"),
    [
        (LOGITS[0], ROWS, {}, r"logits are \[5\]"),
        (LOGITS, replace(ROWS, top_k=ROWS.top_p), {}, "top_k is"),
        (LOGITS, replace(ROWS, seeds=ROWS.seeds[:1]), {}, r"seeds is \[1\]"),
        (LOGITS, ROWS, {"most_top": -1}, "-1 alternatives"),
        (LOGITS, ROWS, {"bias": Bias(ROWS.top_k, ROWS.top_k, ROWS.top_p)}, r"starts is \[2\]"),
        (LOGITS, ROWS, {"penalties": Penalties(ROWS.top_p, ROWS.top_k, *(ROWS.top_p,) * 3)}, "uses are"),
    ],
)
def test_what_does_not_fit_is_refused(logits, rows: SamplingRows, more, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        draw_tokens(logits, rows, **more)
