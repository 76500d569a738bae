"""Examples as batches of rows: which rows count, what each is to guess, and in which order an epoch takes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from ..models.draft_config import FINAL_NORM
from .features import Example, read_examples
from .generation import Sample
from .unroll import Rows

_SHARDS_AT_ONCE = 16  # whose samples are mixed


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Row t of a sequence is (features of token t, token t + 1) and guesses token t + 2.

    next_ids [num_sequences, num_rows]: that token. final [num_sequences, num_rows, hidden_size]: the state that the
    target draws it from. is_answer [num_sequences, num_rows]: rows that count, from the one that reads the last token
    of the prompt and the first of the answer.
    """

    rows: Rows
    next_ids: torch.Tensor
    final: torch.Tensor
    is_answer: torch.Tensor

    @property
    def num_sequences(self) -> int:
        return len(self.next_ids)

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        rows = Rows(self.rows.features.to(device, dtype), self.rows.token_ids.to(device), self.rows.first.to(device))
        return Batch(rows, self.next_ids.to(device), self.final.to(device, dtype), self.is_answer.to(device))


def make_batch(examples: Sequence[Example], skips_prompt: Sequence[bool]) -> Batch:
    """One batch of `examples`. Where `skips_prompt` holds, the head sees nothing before the answer: so it is where a
    sequence comes from another worker.
    """
    parts = [_rows(example, skip) for example, skip in zip(examples, skips_prompt, strict=True)]
    columns = zip(*parts, strict=True)
    features, token_ids, next_ids, final, is_answer = (
        pad_sequence(list(column), batch_first=True) for column in columns
    )
    first = torch.zeros(len(examples), dtype=torch.int64)
    return Batch(Rows(features, token_ids, first), next_ids, final, is_answer)


def _rows(example: Example, skips_prompt: bool) -> tuple[torch.Tensor, ...]:
    """The rows of one example that have a token to guess."""
    answer = len(example.sample.prompt_ids) - 1  # the first row that counts
    start = answer if skips_prompt else 0
    token_ids = torch.tensor(example.sample.token_ids)
    is_answer = torch.arange(start, len(token_ids) - 2) >= answer
    features, final = example.features[start:-2], example.final[start + 1 : -1]
    return features, token_ids[start + 1 : -1], token_ids[start + 2 :], final, is_answer


def epoch_batches(
    paths: Sequence[Path],
    samples: Sequence[Sample],
    max_rows: int,
    rng: random.Random,
    target_layers: Sequence[int] = (FINAL_NORM,),
    leave_out: Callable[[Sample], bool] = lambda _: False,
) -> Iterator[Batch]:
    """Every example with an answer of two tokens or more once, mixed by `rng`, in batches of up to `max_rows` rows with
    their padding. Every other example skips its prompt. Samples for which `leave_out` holds are left out.
    """
    order = list(paths)
    rng.shuffle(order)
    queue = iter(order)
    while group := list(islice(queue, _SHARDS_AT_ONCE)):
        examples = [example for path in group for example in read_examples(path, samples, target_layers)]
        chosen = [e for e in examples if len(e.sample.output_ids) > 1 and not leave_out(e.sample)]
        yield from _mixed(chosen, max_rows, rng)


def _mixed(examples: list[Example], max_rows: int, rng: random.Random) -> Iterator[Batch]:
    rng.shuffle(examples)
    choices = [(example, index % 2 == 0) for index, example in enumerate(examples)]
    choices.sort(key=lambda choice: _num_rows(*choice))
    groups = list(_cut(choices, max_rows))
    rng.shuffle(groups)
    for group in groups:
        yield make_batch([example for example, _ in group], [skip for _, skip in group])


def plain_batches(examples: Iterable[Example], max_rows: int, skips_prompt: bool) -> Iterator[Batch]:
    """The examples in order of length, all with their prompts or all without."""
    choices = [(example, skips_prompt) for example in examples if len(example.sample.output_ids) > 1]
    choices.sort(key=lambda choice: _num_rows(*choice))
    for group in _cut(choices, max_rows):
        yield make_batch([example for example, _ in group], [skip for _, skip in group])


Choice = tuple[Example, bool]


def _num_rows(example: Example, skips_prompt: bool) -> int:
    return len(example.sample.output_ids) - 1 if skips_prompt else example.num_tokens - 2


def _cut(choices: list[Choice], max_rows: int) -> Iterator[list[Choice]]:
    """Groups of neighbours, shortest first, whose rows with padding are at most `max_rows`; one at least."""
    group: list[Choice] = []
    for choice in choices:
        if group and (len(group) + 1) * _num_rows(*choice) > max_rows:
            yield group
            group = []
        group.append(choice)
    if group:
        yield group
