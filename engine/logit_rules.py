"""Changes to logits that a request asks for before a token is drawn: bias, penalties, a minimum length.

Each touches a few (row, token) pairs, so they are collected as pairs and applied with one gather and one scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..protocol.sampling import SamplingParams

Ints = npt.NDArray[np.int64]
_LARGEST = float(np.finfo(np.float32).max)


class History(Protocol):
    """What a row's next token follows: an `engine.sequence.Sequence`, or one with drafted tokens behind it."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def prompt_ids(self) -> list[int]: ...
    @property
    def output_ids(self) -> list[int]: ...


def adjust(logits: torch.Tensor, seqs: Sequence[History], eos_token_ids: frozenset[int]) -> torch.Tensor:
    """Logits [len(seqs), vocab_size] float32 after the rules of each row's request:

    `logits` itself when there are none.
    """
    biased = [row for row, seq in enumerate(seqs) if seq.params.logit_bias]
    penalised = [row for row, seq in enumerate(seqs) if seq.params.has_penalties]
    too_short = [row for row, seq in enumerate(seqs) if len(seq.output_ids) < seq.params.min_tokens]
    if not (biased or penalised or too_short):
        return logits
    adjusted = logits.clone()
    if biased:
        _add_bias(adjusted, biased, seqs)
    if penalised:
        _penalise(adjusted, _pairs(penalised, seqs, logits.shape[1]))
    for row in too_short:
        adjusted[row, sorted(_ending_tokens(seqs[row].params, eos_token_ids))] = -torch.inf
    return adjusted


def _ending_tokens(params: SamplingParams, eos_token_ids: frozenset[int]) -> set[int]:
    return {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}


def _add_bias(logits: torch.Tensor, rows: list[int], seqs: Sequence[History]) -> None:
    where = [(row, token_id) for row in rows for token_id in seqs[row].params.logit_bias]
    amounts = [amount for row in rows for amount in seqs[row].params.logit_bias.values()]
    index = torch.tensor(where).unbind(dim=1)
    logits.index_put_(index, torch.tensor(amounts, dtype=torch.float32), accumulate=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Every (row, token) that a penalised sequence has seen, once, how often it was generated, and the row's
    penalties.
    """

    rows: Ints
    token_ids: Ints
    generated: npt.NDArray[np.float64]
    repetition: npt.NDArray[np.float64]
    presence: npt.NDArray[np.float64]
    frequency: npt.NDArray[np.float64]


def _pairs(rows: list[int], seqs: Sequence[History], vocab_size: int) -> _Pairs:
    seen = [np.array(seqs[row].prompt_ids + seqs[row].output_ids, dtype=np.int64) for row in rows]
    lengths = [len(ids) for ids in seen]
    is_generated = np.concatenate(
        [np.arange(len(ids)) >= len(seqs[row].prompt_ids) for row, ids in zip(rows, seen, strict=True)]
    )
    codes = np.repeat(np.arange(len(rows)), lengths) * vocab_size + np.concatenate(seen)
    unique, place = np.unique(codes, return_inverse=True)
    params = [seqs[row].params for row in rows]
    owner = unique // vocab_size
    return _Pairs(
        rows=np.array(rows)[owner],
        token_ids=unique % vocab_size,
        generated=np.bincount(place, weights=is_generated, minlength=len(unique)).astype(np.float64),
        repetition=np.array([p.repetition_penalty for p in params])[owner],
        presence=np.array([p.presence_penalty for p in params])[owner],
        frequency=np.array([p.frequency_penalty for p in params])[owner],
    )


def _penalise(logits: torch.Tensor, pairs: _Pairs) -> None:
    """Repetition divides what is likely and multiplies what is not;

    then each use of a token costs `frequency`, any `presence`.
    """
    view = logits.numpy()
    values = view[pairs.rows, pairs.token_ids].astype(np.float64)
    values = np.where(values > 0, values / pairs.repetition, values * pairs.repetition)
    values -= pairs.presence * (pairs.generated > 0) + pairs.frequency * pairs.generated
    view[pairs.rows, pairs.token_ids] = np.clip(values, -_LARGEST, _LARGEST)
