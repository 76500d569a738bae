"""Scheduled sequences → one ragged batch, in the order that attention wants it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.paged_attention.plan import Span
from .interface import ScheduledSeq


@dataclass(frozen=True, slots=True)
class Batch:
    """token_ids, positions [num_tokens]; cu_seqlens_q [num_seqs + 1] as offsets into them; all in the order of `order`.

    order[i] is the position in the caller's list of the i-th entry here. sample_rows are the batch rows whose hidden state
    predicts a token, sample_entries the caller's positions they belong to.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens_q: tuple[int, ...]
    spans: tuple[Span, ...]
    order: tuple[int, ...]
    sample_rows: torch.Tensor
    sample_entries: tuple[int, ...]


def build_batch(entries: list[ScheduledSeq]) -> Batch:
    """Sorts by attention bucket and lays the new tokens end to end."""
    spans = [Span(e.num_new_tokens, e.seq.num_computed_tokens, e.seq.block_table) for e in entries]
    order = sorted(range(len(entries)), key=lambda i: (spans[i].bucket, i))
    token_ids: list[int] = []
    ends = [0]
    for i in order:
        seq, start = entries[i].seq, spans[i].num_past
        token_ids += seq.tokens(start, start + spans[i].num_queries)
        ends.append(len(token_ids))
    firsts = np.array([spans[i].num_past for i in order], dtype=np.int64)
    counts = np.diff(np.array(ends, dtype=np.int64))
    positions = np.arange(len(token_ids), dtype=np.int64) + np.repeat(firsts - np.array(ends[:-1], dtype=np.int64), counts)
    sampled = [(row, i) for row, i in zip(ends[1:], order, strict=True) if entries[i].sample]
    return Batch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.from_numpy(positions),
        cu_seqlens_q=tuple(ends),
        spans=tuple(spans[i] for i in order),
        order=tuple(order),
        sample_rows=torch.tensor([row - 1 for row, _ in sampled], dtype=torch.int64),
        sample_entries=tuple(i for _, i in sampled),
    )
