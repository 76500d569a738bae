"""How often a head's guesses are what the target said: rates by place in the chain, and tokens per verification.

A chain's j-th guess counts only where those before it were right, and then its rows are those of step j of the
unrolling; so one unrolled pass over finished samples says how every chain of every length would have fared.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import torch

from ..models.draft_head import DraftHead
from .batches import Batch
from .unroll import unroll

MAX_CHAIN = 5


class Acceptance(msgspec.Struct, frozen=True):
    """position_rates[j]: of chains whose first j guesses were right, the share whose next is too; begun at every token.
    tokens_per_step[k]: mean tokens that a step of the target gives when it verifies chains of k + 1 guesses, one behind
    the other as in serving; 1 is what it gives without. num_tokens: that were to be guessed.
    """

    position_rates: list[float]
    tokens_per_step: list[float]
    num_tokens: int


@torch.inference_mode()
def measure_acceptance(head: DraftHead, batches: Iterable[Batch], max_chain: int = MAX_CHAIN) -> Acceptance:
    """Over all rows of `batches` that count."""
    answers = [answer for batch in batches for answer in _right_guesses(head, batch, max_chain)]
    alive, begun, steps = [0] * (max_chain + 1), [0] * max_chain, [0] * max_chain
    for right in answers:
        lengths = _accepted(right)
        for place in range(max_chain):
            begun[place] += sum(length >= place for length in lengths[: len(lengths) - place])
            alive[place] += sum(length > place for length in lengths)
            steps[place] += _num_steps(lengths, place + 1)
    tokens = sum(right.shape[1] for right in answers)
    return Acceptance(
        [round(hits / max(tries, 1), 4) for hits, tries in zip(alive, begun, strict=False)],
        [round(tokens / max(count, 1), 4) for count in steps],
        tokens,
    )


def _right_guesses(head: DraftHead, batch: Batch, max_chain: int) -> list[torch.Tensor]:
    """For each sequence [max_chain, num_rows that count]: whether step j's guess at row t is the sample's token."""
    right = [
        head.draft_ids[head.logits(hidden).argmax(dim=-1)] == batch.next_ids
        for hidden in unroll(head, batch.rows, max_chain)
    ]
    together = torch.stack(right, dim=1).cpu()
    return [guesses[:, counts] for guesses, counts in zip(together, batch.is_answer.cpu(), strict=True)]


def _accepted(right: torch.Tensor) -> list[int]:
    """For a chain that begins at each row, how many of its first guesses are right; cut off at the end."""
    lengths: list[int] = []
    steps, num_rows = right.shape
    table = right.tolist()
    for start in range(num_rows):
        reach = min(steps, num_rows - start)
        lengths.append(next((j for j in range(reach) if not table[j][start + j]), reach))
    return lengths


def _num_steps(lengths: list[int], chain: int) -> int:
    """Steps of the target until every row is passed, each taking the accepted guesses and one token of its own."""
    at = count = 0
    while at < len(lengths):
        at += min(lengths[at], chain) + 1
        count += 1
    return count
