"""From logits to tokens in Triton, with nothing read back by the host.

`_adjust`: grid (rows, tiles of the vocabulary); bias and penalties into float32 logits. Left out when there are none.
`_draw_rows`: grid (rows). A program goes over its row some times: for the maximum, for the cutoff, for the race, and
for log-probabilities. The cutoff of top-k and of top-p is the least distance from the maximum within which there are k
tokens, or enough weight. Distances are never negative, so their bits are in the order of their values, and the least
one is found digit by digit: eight passes, each with sixteen candidates. No sort, no atomics, and the same result in
every run.

Roofline: bound by memory, if the row were read once: rows · vocab_size · itemsize bytes. A row of 128k float32 logits
stays in the level-2 cache between passes; rows without filters take three passes, one with both filters twenty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_parts import row_offset
from .race import arrival_times, philox
from .rows import LOWEST_TEMPERATURE, Bias, Drawn, Penalties, SamplingRows

_BLOCK = 1024
_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
_ALL: tl.constexpr = tl.constexpr(0xFFFFFFFF)  # beyond the bits of every distance
_LOWEST_TEMPERATURE: tl.constexpr = tl.constexpr(LOWEST_TEMPERATURE)


def launch(
    logits: torch.Tensor, rows: SamplingRows, bias: Bias | None, penalties: Penalties | None, drawn: Drawn
) -> None:
    """As `op.draw_tokens`, checked; fills `drawn`, of which every element is set already."""
    num_rows, vocab_size = logits.shape
    if not num_rows:
        return
    adjusted = logits
    if bias is not None or penalties is not None:
        adjusted = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        _launch_adjust(logits, adjusted, bias, penalties)
    _draw_rows[(num_rows,)](
        logits,
        adjusted,
        rows.seeds,
        rows.indices,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.num_top,
        None if penalties is None else penalties.uses,
        None if penalties is None else penalties.states,
        drawn.token_ids,
        drawn.logprobs,
        drawn.top_ids,
        drawn.top_logprobs,
        logits.stride(0),
        adjusted.stride(0),
        drawn.top_ids.shape[1],
        VOCAB=vocab_size,
        BLOCK=_BLOCK,
        num_warps=8,
    )


def _launch_adjust(
    logits: torch.Tensor, adjusted: torch.Tensor, bias: Bias | None, penalties: Penalties | None
) -> None:
    of_bias = (None, None, None) if bias is None else (bias.starts, bias.token_ids, bias.amounts)
    of_penalties: tuple[torch.Tensor | None, ...] = (None,) * 5
    if penalties is not None:
        p = penalties
        of_penalties = (p.uses, p.states, p.repetition, p.presence, p.frequency)
    _adjust[(logits.shape[0], triton.cdiv(logits.shape[1], _BLOCK))](
        logits, adjusted, *of_bias, *of_penalties, logits.stride(0), VOCAB=logits.shape[1], BLOCK=_BLOCK
    )


@triton.jit
def _adjust(
    logits,
    adjusted,
    starts,
    token_ids,
    amounts,
    uses,
    states,
    repetition,
    presence,
    frequency,
    stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    values = tl.load(logits + row_offset(row, stride) + token, mask=inside, other=0.0).to(tl.float32)
    if starts is not None:
        entry = tl.load(starts + row)
        stop = tl.load(starts + row + 1)
        while entry < stop:  # not a range: the interpreter of Triton 3.6 takes no loaded bounds
            values = tl.where(token == tl.load(token_ids + entry), values + tl.load(amounts + entry), values)
            entry += 1
    if uses is not None:
        state = tl.load(states + row)
        if state >= 0:
            own = tl.load(uses + row_offset(state, VOCAB) + token, mask=inside, other=0)
            generated = (own >> 1).to(tl.float32)
            factor = tl.load(repetition + row)
            changed = tl.where(values > 0, tl.div_rn(values, factor), values * factor)
            changed -= tl.load(presence + row) * (generated > 0).to(tl.float32) + tl.load(frequency + row) * generated
            changed = tl.minimum(tl.maximum(changed, -_LARGEST), _LARGEST)
            values = tl.where((own != 0) & (values > float("-inf")), changed, values)
    tl.store(adjusted + row_offset(row, VOCAB) + token, values, mask=inside)


@triton.jit
def _highest(values, before, before_token, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The highest logit and the first token that has it, among those that come after (before, before_token).

    Higher logits come first, and of equal ones the lower token. A NaN counts as infinite.
    """
    best = tl.full([], float("-inf"), tl.float32)
    best_token = tl.full([], 0, tl.int32)
    is_found = best > 0
    for start in range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit = tl.load(values + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        logit = tl.where(logit == logit, logit, float("inf"))
        is_left = (token < VOCAB) & ((logit < before) | ((logit == before) & (token > before_token)))
        top = tl.max(tl.where(is_left, logit, float("-inf")), axis=0)
        first = tl.min(tl.where(is_left & (logit == top), token, VOCAB), axis=0)
        is_higher = (first < VOCAB) & ((top > best) | (is_found == 0))
        best = tl.where(is_higher, top, best)
        best_token = tl.where(is_higher, first, best_token)
        is_found = is_found | is_higher
    return best, best_token


@triton.jit
def _log_total(values, peak, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """log Σ exp(logit), the sum in float64."""
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logit = tl.load(values + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        total += tl.sum(tl.exp(logit - peak), axis=0).to(tl.float64)
    return peak + tl.log(total.to(tl.float32))


@triton.jit
def _distances(values, token, peak, temperature, VOCAB: tl.constexpr):
    """How far below the maximum each token's scaled logit is; infinite outside the vocabulary."""
    logit = tl.load(values + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.div_rn(peak - logit, temperature)


@triton.jit
def _within(
    values, peak, temperature, limit, thresholds, BY_WEIGHT: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """For each of 16 thresholds how many tokens, or how much weight, lie no further; of those within `limit`. float64.

    limit and thresholds are bits of distances, uint32.
    """
    total = tl.zeros([16], tl.float64)
    for start in range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        distance = _distances(values, token, peak, temperature, VOCAB)
        bits = distance.to(tl.uint32, bitcast=True)
        weight = tl.exp(-distance) if BY_WEIGHT else tl.full([BLOCK], 1.0, tl.float32)
        weight = tl.where((token < VOCAB) & (bits <= limit), weight, 0.0)
        is_near = bits[:, None] <= thresholds[None, :]
        total += tl.sum(tl.where(is_near, weight[:, None], 0.0), axis=0).to(tl.float64)
    return total


@triton.jit
def _least_reaching(
    values, peak, temperature, limit, target, BY_WEIGHT: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """Bits of the least distance within which there is `target`, in number or weight."""
    found = tl.full([], 0, tl.uint32)
    digits = tl.arange(0, 16).to(tl.uint32)
    for level in tl.static_range(8):
        thresholds = found + (digits << (28 - 4 * level)) + ((1 << (28 - 4 * level)) - 1)
        total = _within(values, peak, temperature, limit, thresholds, BY_WEIGHT, VOCAB, BLOCK)
        digit = tl.minimum(tl.sum((total < target).to(tl.int32), axis=0), 15)
        found += digit.to(tl.uint32) << (28 - 4 * level)
    return found


@triton.jit
def _race(values, peak, temperature, cutoff, farthest, seed, index, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The token that arrives first, of those whose distance is at most `farthest` and its bits at most `cutoff`."""
    w0, w1, w2, w3 = philox(seed, index)
    best = tl.full([], -1.0, tl.float32)
    winner = tl.full([], 0, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        distance = _distances(values, token, peak, temperature, VOCAB)
        is_kept = (token < VOCAB) & (distance <= farthest) & (distance.to(tl.uint32, bitcast=True) <= cutoff)
        speed = tl.div_rn(tl.exp(-distance), arrival_times(token, w0, w1, w2, w3))
        speed = tl.where(is_kept, speed, -1.0)
        top = tl.max(speed, axis=0)
        first = tl.min(tl.where(speed == top, token, VOCAB), axis=0)
        winner = tl.where(top > best, first, winner)
        best = tl.maximum(best, top)
    return winner


@triton.jit
def _draw_rows(
    logits,
    adjusted,
    seeds,
    indices,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    num_tops,
    uses,
    states,
    token_ids,
    logprobs,
    top_ids,
    top_logprobs,
    logits_stride,
    adjusted_stride,
    most_top,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    raw = logits + row_offset(row, logits_stride)
    values = adjusted + row_offset(row, adjusted_stride)
    raw_peak, _ = _highest(raw, float("inf"), -1, VOCAB, BLOCK)
    peak, token = _highest(values, float("inf"), -1, VOCAB, BLOCK)
    is_sound = (tl.abs(peak) < float("inf")) & (tl.abs(raw_peak) < float("inf"))
    if is_sound:
        temperature = tl.load(temperatures + row)
        if temperature > 0:
            temperature = tl.maximum(temperature, _LOWEST_TEMPERATURE)
            top_k = tl.load(top_ks + row)
            top_p = tl.load(top_ps + row)
            min_p = tl.load(min_ps + row)
            cutoff = tl.full([], _ALL, tl.uint32)
            if (top_k > 0) & (top_k < VOCAB):
                wanted = top_k.to(tl.float64)
                cutoff = _least_reaching(values, peak, temperature, cutoff, wanted, False, VOCAB, BLOCK)
            if top_p < 1:
                everything = tl.full([16], _ALL, tl.uint32)
                mass = tl.max(_within(values, peak, temperature, cutoff, everything, True, VOCAB, BLOCK), axis=0)
                wanted = top_p.to(tl.float64) * mass
                cutoff = _least_reaching(values, peak, temperature, cutoff, wanted, True, VOCAB, BLOCK)
            farthest = tl.where(min_p > 0, -tl.log(tl.where(min_p > 0, min_p, 1.0)), float("inf"))
            seed = tl.load(seeds + row)
            token = _race(values, peak, temperature, cutoff, farthest, seed, tl.load(indices + row), VOCAB, BLOCK)
        tl.store(token_ids + row, token.to(tl.int64))
        if uses is not None:
            state = tl.load(states + row)
            use = uses + row_offset(state, VOCAB) + token
            tl.store(use, tl.load(use, mask=state >= 0, other=0) + 2, mask=state >= 0)
        num_top = tl.minimum(tl.load(num_tops + row), tl.minimum(most_top, VOCAB))
        if num_top >= 0:
            log_total = _log_total(raw, raw_peak, VOCAB, BLOCK)
            tl.store(logprobs + row, tl.load(raw + token).to(tl.float32) - log_total)
            logit, other = _highest(raw, float("inf"), -1, VOCAB, BLOCK)
            place = num_top * 0
            while place < num_top:
                tl.store(top_ids + row_offset(row, most_top) + place, other.to(tl.int64))
                tl.store(top_logprobs + row_offset(row, most_top) + place, logit - log_total)
                logit, other = _highest(raw, logit, other, VOCAB, BLOCK)
                place += 1
