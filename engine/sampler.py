"""From logits to tokens, for all rows of a step at once; what nobody asked for is not computed.

    logits → + bias → penalties → minimum length → temperature → top-k → top-p → min-p → draw    (greedy: argmax)

Top-k, top-p and min-p each keep the tokens from some logit upwards, so together they are one cutoff; tokens that tie
with the cutoff are all kept. Top-p counts within what top-k keeps. The draw is a race of what is left (`race.py`),
with times that depend on (seed, choice, token index, token) alone. So the outcome of a row depends on its logits and
its request, never on the rows beside it, and hardly ever on the last bits of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from ..core.errors import InternalError
from ..core.random_bits import choice_seed
from ..kernels.decoder_step.op import StepLogits, likeliest
from ..protocol.messages import SampledToken, TokenLogprob
from ..protocol.sampling import SamplingParams
from .logit_rules import adjust
from .race import race_key, winner
from .sequence import Sequence

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_HEADS = (128, 4096)  # likeliest tokens among which a cutoff is sought before the row is sorted as a whole
_LOWEST_TEMPERATURE = 1e-5  # below, float32 logits divided by it would overflow; the draw is greedy long before


@dataclass(frozen=True, slots=True)
class SampledRow:
    """One token to be drawn: for `choice` of `seq`, from row `row` of the logits, behind drafted tokens `ahead`."""

    row: int
    seq: Sequence
    choice: int
    ahead: tuple[int, ...] = ()

    @property
    def params(self) -> SamplingParams:
        return self.seq.params

    @property
    def prompt_ids(self) -> list[int]:
        return self.seq.prompt_ids

    @property
    def output_ids(self) -> list[int]:
        """Of the sequence, and those ahead."""
        return [*self.seq.output_ids, *self.ahead] if self.ahead else self.seq.output_ids

    @property
    def index(self) -> int:
        """Of the token within the output."""
        return len(self.seq.output_ids) + len(self.ahead)


@torch.inference_mode()
def sample(result: StepLogits, rows: list[SampledRow], eos_token_ids: frozenset[int]) -> list[SampledToken]:
    """One token for each of `rows`, out of what a step gave.

    Raises InternalError that names the request whose logits hold no finite maximum (NaN, or all masked).
    """
    if not rows:
        return []
    index = [row.row for row in rows]
    raw = _spread(result.logits, index)
    _check_finite(result.highest[index], rows)
    adjusted = adjust(raw, rows, eos_token_ids)
    best = result.best[index]
    if adjusted is not raw:
        again = likeliest(adjusted)
        _check_finite(again.highest, rows)
        best = again.best
    token_ids = _choose(adjusted, best, rows)
    logprobs = _logprobs(raw, rows, token_ids)
    return [SampledToken(token_id, logprobs.get(index)) for index, token_id in enumerate(token_ids)]


def _spread(logits: torch.Tensor, index: list[int]) -> torch.Tensor:
    """One row of `logits` for each of `index`; several choices may share one."""
    return logits if index == list(range(logits.shape[0])) else logits[index]


def _check_finite(highest: Floats, rows: list[SampledRow]) -> None:
    is_finite = np.isfinite(highest)
    if is_finite.all():
        return
    bad = int(np.flatnonzero(~is_finite)[0])
    raise InternalError(
        f"request {rows[bad].seq.key}: the highest logit is {float(highest[bad])}, no token can be drawn"
    )


def _choose(logits: torch.Tensor, best: Ints, rows: list[SampledRow]) -> list[int]:
    """`best`: the likeliest token of each row, which is what greedy rows take."""
    token_ids = best.copy()
    drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        some = logits if len(drawn) == len(rows) else logits[drawn]
        token_ids[drawn] = _draw(_weights(some, [rows[i].params for i in drawn]), [rows[i] for i in drawn])
    chosen: list[int] = token_ids.tolist()
    return chosen


def _draw(weights: torch.Tensor, rows: list[SampledRow]) -> list[int]:
    keys = (race_key(choice_seed(row.params.seed, row.choice), row.index) for row in rows)
    return [winner(own, key) for own, key in zip(weights.numpy(), keys, strict=True)]


def _weights(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Unnormalised probabilities [rows, vocab_size]: 1 for the likeliest token, 0 for those that are filtered out."""
    temperatures = torch.tensor([max(p.temperature, _LOWEST_TEMPERATURE) for p in params])
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures[:, None])
    cutoffs = _cutoffs(scaled, params)
    weights = scaled.exp()
    return weights if cutoffs is None else weights.masked_fill_(scaled < cutoffs[:, None], 0)


def _cutoffs(scaled: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor | None:
    """The lowest scaled logit that each row keeps; None when no row filters. Row maxima are 0."""
    if not any(p.top_k or p.top_p < 1 or p.min_p for p in params):
        return None
    cutoffs = torch.tensor([np.log(p.min_p) if p.min_p else -np.inf for p in params], dtype=torch.float32)
    ordered = [index for index, p in enumerate(params) if p.top_k or p.top_p < 1]
    if ordered:
        some = scaled if len(ordered) == len(params) else scaled[ordered]
        cutoffs[ordered] = cutoffs[ordered].maximum(_ordered_cutoffs(some, [params[i] for i in ordered]))
    return cutoffs


def _ordered_cutoffs(scaled: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """The cutoff of top-k and top-p: sought among a few of the likeliest tokens, then among more, then among all."""
    vocab_size = scaled.shape[1]
    top_k = torch.tensor([min(p.top_k, vocab_size) or vocab_size for p in params])
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64)
    cutoffs = torch.empty(len(params))
    rest = torch.arange(len(params))
    for width in (*(width for width in _HEADS if width < vocab_size), vocab_size):
        some = scaled if len(rest) == len(params) else scaled[rest]
        head = some.topk(width, dim=-1) if width < vocab_size else some.sort(dim=-1, descending=True)
        cutoffs[rest], is_known = _cutoffs_in(head.values, some, top_k[rest], top_p[rest])
        rest = rest[~is_known]
        if not len(rest):
            break
    return cutoffs


def _cutoffs_in(
    head: torch.Tensor, scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cutoffs as far as `head` shows them, and which of them are final.

    head [rows, width]: the highest logits of each row, best first.
    """
    width, vocab_size = head.shape[1], scaled.shape[1]
    k_cutoff = torch.where(top_k < vocab_size, head.gather(1, _at(top_k, width))[:, 0], -torch.inf)
    is_known = (top_k <= width) | (top_k == vocab_size)
    if bool((top_p == 1).all()):
        return k_cutoff, is_known
    mass = _mass_from(scaled, k_cutoff)
    reached = head.exp().double().cumsum(dim=-1)
    place = (reached < (top_p * mass)[:, None]).sum(dim=-1) + 1  # how many tokens it takes to reach top_p
    p_cutoff = torch.where(top_p < 1, head.gather(1, _at(place, width))[:, 0], -torch.inf)
    is_known &= (top_p == 1) | (place <= width)
    return k_cutoff.maximum(p_cutoff), is_known


def _at(place: torch.Tensor, width: int) -> torch.Tensor:
    """Column of the token at this place from the top (1 is the likeliest), [rows, 1]."""
    return (place.clamp(max=width) - 1)[:, None]


def _mass_from(scaled: torch.Tensor, cutoff: torch.Tensor) -> torch.Tensor:
    """Sum of the weights at or above `cutoff`, [rows] float64."""
    weights = scaled.exp()
    if bool((cutoff > -torch.inf).any()):
        weights.masked_fill_(scaled < cutoff[:, None], 0)
    return weights.sum(dim=-1, dtype=torch.float64)


def _logprobs(raw: torch.Tensor, rows: list[SampledRow], token_ids: list[int]) -> dict[int, TokenLogprob]:
    """Row → log-probabilities under the model itself, for the rows that ask."""
    asking = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    if not asking:
        return {}
    some = raw[asking]
    total = some.logsumexp(dim=-1, keepdim=True)
    chosen = (some.gather(1, torch.tensor([[token_ids[i]] for i in asking])) - total)[:, 0].tolist()
    counts = [rows[i].params.logprobs or 0 for i in asking]
    best = some.topk(min(max(counts), some.shape[1]), dim=-1)
    ids, values = best.indices.tolist(), (best.values - total).tolist()
    return {
        index: TokenLogprob(chosen[n], tuple(islice(zip(ids[n], values[n], strict=True), counts[n])))
        for n, index in enumerate(asking)
    }
