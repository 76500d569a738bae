"""From logits to tokens one row at a time, the whole row sorted; the same rules as the sampler of the engine."""

from __future__ import annotations

import torch

from ...core.random_bits import philox4x32
from .rows import LOWEST_TEMPERATURE, Bias, Drawn, Penalties, SamplingRows

_MASK = 0xFFFFFFFF
_LARGEST = torch.finfo(torch.float32).max


def draw_tokens(
    logits: torch.Tensor, rows: SamplingRows, bias: Bias | None, penalties: Penalties | None, most_top: int
) -> Drawn:
    """As `op.draw_tokens`."""
    drawn = empty_drawn(logits, most_top)
    for row in range(logits.shape[0]):
        raw = logits[row].float()
        adjusted = adjust(raw, row, bias, penalties)
        if not (raw.max().isfinite() and adjusted.max().isfinite()):
            continue
        token = _choose(adjusted, rows, row)
        drawn.token_ids[row] = token
        if penalties is not None and penalties.states[row] >= 0:
            penalties.uses[penalties.states[row], token] += 2
        num_top = min(int(rows.num_top[row]), most_top, logits.shape[1])
        if num_top >= 0:
            logprobs = raw.log_softmax(dim=-1)
            best = logprobs.sort(descending=True, stable=True)
            drawn.logprobs[row] = logprobs[token]
            drawn.top_ids[row, :num_top] = best.indices[:num_top]
            drawn.top_logprobs[row, :num_top] = best.values[:num_top]
    return drawn


def empty_drawn(logits: torch.Tensor, most_top: int) -> Drawn:
    shape, device = (logits.shape[0], most_top), logits.device
    return Drawn(
        torch.full(shape[:1], -1, dtype=torch.int64, device=device),
        torch.full(shape[:1], torch.nan, device=device),
        torch.full(shape, -1, dtype=torch.int64, device=device),
        torch.full(shape, torch.nan, device=device),
    )


def adjust(raw: torch.Tensor, row: int, bias: Bias | None, penalties: Penalties | None) -> torch.Tensor:
    """Logits [vocab_size] after bias and penalties."""
    adjusted = raw.clone()
    if bias is not None:
        own = slice(*bias.starts[row : row + 2].tolist())
        adjusted.index_put_((bias.token_ids[own].long(),), bias.amounts[own], accumulate=True)
    if penalties is None or penalties.states[row] < 0:
        return adjusted
    uses = penalties.uses[penalties.states[row]]
    repetition = penalties.repetition[row]
    values = torch.where(adjusted > 0, adjusted / repetition, adjusted * repetition)
    generated = uses >> 1
    values = values - penalties.presence[row] * (generated > 0) - penalties.frequency[row] * generated
    is_changed = (uses > 0) & (adjusted > -torch.inf)
    return torch.where(is_changed, values.clamp(-_LARGEST, _LARGEST), adjusted)


def _choose(logits: torch.Tensor, rows: SamplingRows, row: int) -> int:
    if rows.temperature[row] == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / rows.temperature[row].clamp(min=LOWEST_TEMPERATURE)
    weights = scaled.exp()
    weights[scaled < _cutoff(scaled, rows, row)] = 0
    words = draw_words(int(rows.seeds[row]), int(rows.indices[row]))
    return int((weights / arrival_times(words, len(weights))).argmax())


def _cutoff(scaled: torch.Tensor, rows: SamplingRows, row: int) -> torch.Tensor:
    """The lowest of the scaled logits that is kept."""
    top_k, top_p, min_p = int(rows.top_k[row]), float(rows.top_p[row]), rows.min_p[row]
    cutoff = min_p.log()
    best = scaled.sort(descending=True).values
    if 0 < top_k < len(best):
        cutoff = cutoff.maximum(best[top_k - 1])
        best = best[best >= best[top_k - 1]]
    if top_p < 1:
        reached = best.exp().double().cumsum(dim=0)
        cutoff = cutoff.maximum(best[(reached < top_p * reached[-1]).sum()])
    return cutoff


def draw_words(seed: int, index: int) -> tuple[int, int, int, int]:
    """What makes the times of one draw."""
    return philox4x32((index & _MASK, index >> 32 & _MASK, 1, 0), (seed & _MASK, seed >> 32 & _MASK))


def arrival_times(words: tuple[int, int, int, int], vocab_size: int) -> torch.Tensor:
    """Exponential times of rate 1 for every token: as `engine.race` has them, in int64."""
    mixed = torch.arange(vocab_size) * 0x9E3779B1 & _MASK
    rounds = ((0x85EBCA6B, 0xC2B2AE35), (0x7FEB352D, 0x846CA68B))
    for (first, second), (before, between) in zip(rounds, (words[:2], words[2:]), strict=True):
        mixed ^= before
        mixed ^= mixed >> 16
        mixed = _times(mixed, first)
        mixed ^= mixed >> 15
        mixed = mixed + between & _MASK
        mixed = _times(mixed, second)
        mixed ^= mixed >> 16
    share = (mixed.float() + 0.5) * 2**-32
    return -torch.log1p(-share.clamp(max=1 - 2**-24))


def _times(words: torch.Tensor, factor: int) -> torch.Tensor:
    """The low 32 bits of a product of 32-bit words, which as a whole need not fit 63 bits."""
    return (words * (factor & 0xFFFF) + ((words * (factor >> 16) & 0xFFFF) << 16)) & _MASK
