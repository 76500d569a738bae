"""Logits → tokens, all rows at once. What no row asks for is not computed.

Order: logit bias, penalties, forbidden stop tokens, temperature, top-k, top-p, min-p, draw. The draw inverts the cumulative
distribution in vocabulary order at one uniform number that depends on (seed of the choice, token index) only. Logprobs are those of
the model itself, before any of it. `sampler_reference` says the same one row at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.errors import InternalError
from ..core.random_bits import choice_seed, uniform
from ..protocol.messages import SampledToken, TokenLogprob
from ..protocol.sampling import SamplingParams
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to draw: for `choice` of `seq`, from row `logits_row` of the logits."""

    seq: Sequence
    choice: int
    logits_row: int

    @property
    def params(self) -> SamplingParams:
        return self.seq.params


def sample(logits: torch.Tensor, rows: list[SampleRow], eos_token_ids: frozenset[int]) -> list[SampledToken]:
    """logits [n, vocab_size] float32, not changed. Raises InternalError when a row holds NaN or no finite value."""
    picked = logits if [r.logits_row for r in rows] == list(range(logits.shape[0])) else logits[[r.logits_row for r in rows]]
    tokens = _tokens(picked, rows, eos_token_ids)
    logprobs = _logprobs(picked, rows, tokens)
    return [SampledToken(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]


def _tokens(logits: torch.Tensor, rows: list[SampleRow], eos: frozenset[int]) -> list[int]:
    adjusted = _adjust(logits, rows, eos)
    best, greedy = adjusted.max(dim=-1)
    if not torch.isfinite(best).all():
        bad = rows[int((~torch.isfinite(best)).nonzero()[0])]
        raise InternalError(f"the logits of request {bad.seq.key.request_id} hold no finite maximum")
    tokens: list[int] = greedy.tolist()
    drawn = [i for i, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        some = adjusted if len(drawn) == len(rows) else adjusted[drawn]
        for i, token in zip(drawn, _draw(some, [rows[i] for i in drawn]), strict=True):
            tokens[i] = token
    return tokens


def _adjust(logits: torch.Tensor, rows: list[SampleRow], eos: frozenset[int]) -> torch.Tensor:
    """Bias, penalties and forbidden tokens; a copy only if some row has any."""
    touched = [i for i, row in enumerate(rows) if _needs_adjustment(row)]
    if not touched:
        return logits
    adjusted = logits.clone()
    for i in touched:
        _adjust_row(adjusted[i], rows[i], eos)
    return adjusted


def _needs_adjustment(row: SampleRow) -> bool:
    params = row.params
    return bool(params.logit_bias) or params.has_penalties or len(row.seq.output_ids) < params.min_tokens


def _adjust_row(logits: torch.Tensor, row: SampleRow, eos: frozenset[int]) -> None:
    """In place. Touches only the tokens that a setting names, so it does not grow with the vocabulary."""
    params, output = row.params, row.seq.output_ids
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.seq.prompt_ids, *output}))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(output).unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        logits[torch.tensor(list(params.logit_bias))] += torch.tensor(list(params.logit_bias.values()))
    if len(output) < params.min_tokens:
        forbidden = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
        logits[torch.tensor(sorted(forbidden), dtype=torch.int64)] = -torch.inf


def _draw(logits: torch.Tensor, rows: list[SampleRow]) -> list[int]:
    """One token for each row, by inverting the cumulative distribution."""
    params = [row.params for row in rows]
    probs = torch.softmax(logits.double() / torch.tensor([[p.temperature] for p in params], dtype=torch.float64), dim=-1)
    probs = _keep_likely(probs, params)
    cumulative = probs.cumsum(dim=-1)
    draws = [uniform(choice_seed(r.params.seed, r.choice), len(r.seq.output_ids)) for r in rows]
    targets = torch.tensor(draws, dtype=torch.float64).unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    # A target that rounding puts at the very end belongs to the last token that has any probability.
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    result: list[int] = torch.minimum(tokens, last).tolist()
    return result


def _keep_likely(probs: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Zero what top-k, top-p and min-p leave out, in that order, each on what the one before kept."""
    sorting = [i for i, p in enumerate(params) if 0 < p.top_k < probs.shape[-1] or p.top_p < 1]
    if sorting:
        probs = probs.clone()
        probs[sorting] = _keep_head(probs[sorting], [params[i] for i in sorting])
    if any(p.min_p for p in params):
        floor = probs.max(dim=-1, keepdim=True).values * torch.tensor([[p.min_p] for p in params], dtype=probs.dtype)
        probs = probs.masked_fill(probs < floor, 0)
    return probs


def _keep_head(probs: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """top_k most likely; of these the smallest head whose share reaches top_p. Equal probabilities: lower ids first."""
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[-1])
    top_k = torch.tensor([[p.top_k or probs.shape[-1]] for p in params])
    ordered = ordered.masked_fill(rank >= top_k, 0)
    before = ordered.cumsum(dim=-1) - ordered
    top_p = torch.tensor([[p.top_p] for p in params], dtype=probs.dtype) * ordered.sum(dim=-1, keepdim=True)
    drop = (before >= top_p) & (torch.tensor([[p.top_p < 1] for p in params])) & (rank > 0)
    return torch.zeros_like(probs).scatter_(-1, ids, ordered.masked_fill(drop, 0))


def _logprobs(logits: torch.Tensor, rows: list[SampleRow], tokens: list[int]) -> list[TokenLogprob | None]:
    asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    found: list[TokenLogprob | None] = [None] * len(rows)
    if not asking:
        return found
    logprobs = torch.log_softmax(logits[asking].float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor([[tokens[i]] for i in asking])).squeeze(1).tolist()
    most = max(rows[i].params.logprobs or 0 for i in asking)
    values, ids = (t.tolist() for t in logprobs.topk(most, dim=-1)) if most else ([[]] * len(asking),) * 2
    for position, i in enumerate(asking):
        count = rows[i].params.logprobs or 0
        top = tuple(zip(ids[position][:count], values[position][:count], strict=True))
        found[i] = TokenLogprob(chosen[position], top)
    return found
