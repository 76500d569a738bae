"""What the op takes and gives, all of it on the device. A row of each array belongs to a row of the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOWEST_TEMPERATURE = 1e-5  # below, float32 logits divided by it would overflow; the draw is greedy long before


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRows:
    """How each row is drawn, [rows].

    seeds, indices int64: the seed of the choice and the index of the token that is drawn. num_top int32: how many
    alternatives to name beside the chosen token; -1 for no log-probabilities at all. temperature 0 is greedy; top_k 0,
    top_p 1 and min_p 0 are off.
    """

    seeds: torch.Tensor
    indices: torch.Tensor
    temperature: torch.Tensor  # float32
    top_k: torch.Tensor  # int32
    top_p: torch.Tensor  # float32
    min_p: torch.Tensor  # float32
    num_top: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    """What is added to single logits before the penalties; -inf forbids a token.

    starts [rows + 1] int32: row r owns the entries in [starts[r], starts[r + 1]). token_ids [n] int32, amounts [n]
    float32; an id named twice gets both.
    """

    starts: torch.Tensor
    token_ids: torch.Tensor
    amounts: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    """Repetition, presence and frequency, [rows] float32, and what each sequence has used.

    uses [num_states, vocab_size] int32: twice the times a token was generated, plus 1 if the prompt holds it. The op
    adds the token it draws. states [rows] int32: the sequence's row of `uses`; -1 for one without penalties.
    """

    uses: torch.Tensor
    states: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """token_ids [rows] int64; -1 where the highest logit is not finite, so that no token can be drawn.

    logprobs [rows] and top_logprobs [rows, most] float32, top_ids [rows, most] int64: of the model itself, before bias,
    penalties and temperature; NaN and -1 where a row did not ask.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def count_uses(prompt_ids: list[int], output_ids: list[int], vocab_size: int) -> torch.Tensor:
    """A row of `Penalties.uses` for a sequence that comes or comes back, [vocab_size] int32."""
    outputs = torch.bincount(torch.tensor(output_ids, dtype=torch.int64), minlength=vocab_size)
    uses = 2 * outputs
    uses[sorted(set(prompt_ids))] += 1
    return uses.to(torch.int32)
