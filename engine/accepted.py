"""What a step leaves of the drafts that it verified: the path that was drawn, as if it alone had been computed.

rows, slots     last token   a   b   c   d          drawn: a d and another
afterwards      last token   a   d                  the rest is rolled back by the scheduler
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..protocol.messages import SampledToken
from .batch import Batch, Ints
from .draft_tree import path_of
from .interface import ScheduledSeq

Drawn = list[tuple[SampledToken, ...]]


def path_drawn(entry: ScheduledSeq, tokens: tuple[SampledToken, ...]) -> tuple[int, ...]:
    """The drafted tokens among those drawn."""
    return path_of(entry.draft, entry.parents, (token.token_id for token in tokens))


def moved_slots(batch: Batch, entries: list[ScheduledSeq], drawn: Drawn) -> tuple[Ints, Ints]:
    """From which slots to which keys and values go, so that each path lies in consecutive ones."""
    pairs = list(_moved_rows(batch, entries, drawn))
    rows = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return batch.slot_mapping[rows[:, 0]], batch.slot_mapping[rows[:, 1]]


def _moved_rows(batch: Batch, entries: list[ScheduledSeq], drawn: Drawn) -> Iterator[tuple[int, int]]:
    for entry, tokens, stop in zip(entries, drawn, batch.cu_seqlens_q[1:].tolist(), strict=True):
        if entry.parents:
            first = stop - len(entry.draft)
            path = path_drawn(entry, tokens)
            yield from ((first + at, first + place) for place, at in enumerate(path) if at != place)


def drawn_rows(entries: list[ScheduledSeq], drawn: Drawn) -> list[int]:
    """Of the sampled rows those that tokens were drawn from: one of each entry, and those along its draft's path."""
    rows: list[int] = []
    row = 0
    for entry, tokens in zip(entries, drawn, strict=True):
        if entry.sample:
            rows += [row, *(row + 1 + at for at in path_drawn(entry, tokens))]
            row += 1 + len(entry.draft)
    return rows
