"""A head over whole sequences as it will be used: guesses that build on guesses (training-time test, EAGLE-3).

In step 1 every row reads the target's features. In step j it reads what step j - 1 gave at the row before, so it stands
for the j-th guess of a chain that began j - 1 rows earlier; the token that goes in is always the sample's.

    row t of step j attends to    rows [first, t - j + 1] of step 1      what the target has computed
                                  row t - j + i of step i, i = 2 … j     the chain so far
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..models.draft_head import DraftHead, Entrance


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A batch, padded at the end. features [num_sequences, num_rows, feature_size]; token_ids [num_sequences,
    num_rows]: of row t, the token t + 1. first [num_sequences]: rows before are not seen, as if the head came later.
    """

    features: torch.Tensor
    token_ids: torch.Tensor
    first: torch.Tensor


def unroll(head: DraftHead, rows: Rows, num_steps: int) -> Iterator[torch.Tensor]:
    """Hidden states [num_sequences, num_rows, hidden_size] of each step. Row t of step j is meaningful from
    `first` + j - 1 on.
    """
    positions = torch.arange(rows.token_ids.shape[1], device=rows.token_ids.device)
    positions = positions.expand_as(rows.token_ids)
    hidden = head.fuse(rows.features)
    entrances: list[Entrance] = []
    for _ in range(num_steps):
        entrances.append(head.enter(hidden, rows.token_ids, positions))
        output = head.leave(entrances[-1].residual, _attend(head, entrances, rows.first))
        yield output
        hidden = _later(output, 1)


def _later(x: torch.Tensor, by: int) -> torch.Tensor:
    """Each row as it was `by` rows before; the first rows stay what they are, and count for nothing."""
    return torch.cat((x[:, :by], x[:, : x.shape[1] - by]), dim=1) if by else x


def _attend(head: DraftHead, entrances: list[Entrance], first: torch.Tensor) -> torch.Tensor:
    """[num_sequences, num_rows, num_heads, head_dim], of the last of the steps."""
    step, start = len(entrances), entrances[0]
    groups = head.config.layer.num_heads // head.config.layer.num_kv_heads
    q = entrances[-1].q
    q = q.view(*q.shape[:2], -1, groups, q.shape[-1]) * head.scale  # [sequences, rows, kv_heads, groups, head_dim]
    scores = torch.einsum("btkgd,bskd->bkgts", q, start.k)
    scores = scores.float().masked_fill(~_seen(first, q.shape[1], step), -torch.inf)
    chain = [
        (_later(entrance.k, step - i), _later(entrance.v, step - i)) for i, entrance in enumerate(entrances[1:], 2)
    ]
    own = [torch.einsum("btkgd,btkd->bkgt", q, k).float() for k, _ in chain]
    weights = torch.cat((scores, *(score.unsqueeze(-1) for score in own)), dim=-1).softmax(dim=-1).to(q.dtype)
    length = start.k.shape[1]
    attended = torch.einsum("bkgts,bskd->btkgd", weights[..., :length], start.v)
    for number, (_, v) in enumerate(chain):
        attended = attended + torch.einsum("bkgt,btkd->btkgd", weights[..., length + number], v)
    return attended.flatten(2, 3)


def _seen(first: torch.Tensor, num_rows: int, step: int) -> torch.Tensor:
    """[num_sequences, 1, 1, num_rows, num_rows]: what row t of a step sees of step 1. A row that would see nothing sees
    the first: it counts for nothing, and must not become NaN.
    """
    at = torch.arange(num_rows, device=first.device)
    newest = (at - step + 1).clamp(min=0).unsqueeze(-1)
    earliest = torch.minimum(first.view(-1, 1, 1), newest)
    return ((at <= newest) & (at >= earliest)).unsqueeze(1).unsqueeze(1)
