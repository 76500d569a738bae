from __future__ import annotations

import torch

from penstock.core.ids import AttemptKey
from penstock.engine.logit_rules import adjust
from penstock.engine.sequence import Sequence
from penstock.protocol.sampling import SamplingParams

EOS = frozenset({0})
LOGITS = torch.tensor([[1.0, 2.0, -3.0, 4.0, 0.5, -1.0]])


def seq(params: SamplingParams, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = ()) -> Sequence:
    return Sequence(AttemptKey("r", 0), 0, list(prompt), params, b"", 0.0, 1.0, list(output))


def adjusted(params: SamplingParams, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = ()) -> list[float]:
    before = LOGITS.clone()
    result: list[float] = adjust(LOGITS, [seq(params, prompt, output)], EOS)[0].tolist()
    assert torch.equal(LOGITS, before)
    return result


def test_no_rules_give_the_same_tensor() -> None:
    assert adjust(LOGITS, [seq(SamplingParams(temperature=0.5, top_p=0.5, seed=3))], EOS) is LOGITS


def test_bias_is_added() -> None:
    assert adjusted(SamplingParams(logit_bias={2: 10.0, 5: -100.0})) == [1.0, 2.0, 7.0, 4.0, 0.5, -101.0]


def test_repetition_counts_prompt_and_output_once() -> None:
    # Tokens 1 and 2 are in the prompt, 3 was generated twice.
    assert adjusted(SamplingParams(repetition_penalty=2.0), output=(3, 3)) == [1.0, 1.0, -6.0, 2.0, 0.5, -1.0]


def test_presence_and_frequency_count_output_only() -> None:
    assert adjusted(SamplingParams(presence_penalty=0.5), output=(3, 3, 4)) == [1.0, 2.0, -3.0, 3.5, 0.0, -1.0]
    assert adjusted(SamplingParams(frequency_penalty=0.5), output=(3, 3, 4)) == [1.0, 2.0, -3.0, 3.0, 0.0, -1.0]
    assert adjusted(SamplingParams(frequency_penalty=-1.0), output=(5,)) == [1.0, 2.0, -3.0, 4.0, 0.5, 0.0]


def test_penalties_follow_bias_and_each_other() -> None:
    params = SamplingParams(logit_bias={3: 2.0}, repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.25)
    assert adjusted(params, prompt=(5,), output=(3, 3)) == [1.0, 2.0, -3.0, (4 + 2) / 2 - 1 - 0.5, 0.5, -2.0]


def test_ends_are_masked_until_the_minimum_length() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(3,), logit_bias={0: 100.0})
    inf = float("inf")
    assert adjusted(params, output=(4,)) == [-inf, 2.0, -3.0, -inf, 0.5, -1.0]
    assert adjusted(params, output=(4, 4)) == [101.0, 2.0, -3.0, 4.0, 0.5, -1.0]


def test_ignored_eos_is_not_masked() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(3,), ignore_eos=True)
    assert adjusted(params) == [1.0, 2.0, -3.0, -float("inf"), 0.5, -1.0]


def test_extreme_penalties_stay_finite() -> None:
    tiny = SamplingParams(repetition_penalty=1e-300)
    assert torch.tensor(adjusted(tiny, prompt=(0, 1, 2, 3))).isfinite().all()


def test_rows_do_not_see_each_other() -> None:
    seqs = [
        seq(SamplingParams(repetition_penalty=2.0), (1,)),
        seq(SamplingParams()),
        seq(SamplingParams(frequency_penalty=1.0), (1,), (4, 4)),
        seq(SamplingParams(logit_bias={1: 1.0})),
    ]
    together = adjust(LOGITS.repeat(4, 1), seqs, EOS)
    alone = torch.cat([adjust(LOGITS, [one], EOS) for one in seqs])
    assert torch.equal(together, alone)
