"""Decoding a set of sequences to their ends, one step ahead of what the host has read."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, field

import numpy as np

from ..core.errors import InternalError
from .batch import Ints
from .decode_batch import DecodeBatch
from .graph_step import GraphStep, Ids


@dataclass(slots=True, eq=False)
class Decoding:
    """A sequence that decodes greedily.

    num_tokens: how many are in the pool at first; last_id: the one after them, which is not. block_table has blocks
    for num_tokens + max_new_tokens tokens. It ends behind an id of `stop_ids`, which is its last.
    """

    block_table: Ints
    num_tokens: int
    last_id: int
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    output_ids: list[int] = field(default_factory=list)
    num_launched: int = 0

    @property
    def is_stopped(self) -> bool:
        return bool(self.output_ids) and self.output_ids[-1] in self.stop_ids

    @property
    def wants_step(self) -> bool:
        return self.num_launched < self.max_new_tokens and not self.is_stopped


def decode(step: GraphStep, seqs: Several[Decoding]) -> int:
    """Fill the `output_ids` of all; how many steps it took.

    A step is launched before the ids of the one before are read, so a sequence that stops has one row too many, whose
    id is dropped. Raises InternalError for a row whose logits hold no finite maximum.
    """
    before: tuple[Ids, list[Decoding]] | None = None
    num_steps = 0
    while True:
        running = [seq for seq in seqs if seq.wants_step]
        ids = step.launch(_batch(running, before[1] if before else [])) if running else None
        if before is not None:
            _append(*before)
        if ids is None:
            return num_steps
        before = ids, running
        num_steps += 1


def _batch(running: list[Decoding], before: list[Decoding]) -> DecodeBatch:
    """The next step of `running`; marks it as launched. `before`: the rows of the last step."""
    rows = {id(seq): row for row, seq in enumerate(before)}
    table = np.zeros((len(running), max(len(seq.block_table) for seq in running)), dtype=np.int64)
    for row, seq in zip(table, running, strict=True):
        row[: len(seq.block_table)] = seq.block_table
        seq.num_launched += 1
    return DecodeBatch(
        context_lens=np.array([seq.num_tokens + seq.num_launched for seq in running]),
        block_table=table,
        sources=np.array([rows.get(id(seq), -1) for seq in running]),
        token_ids=np.array([seq.last_id for seq in running]),
    )


def _append(ids: Ids, rows: list[Decoding]) -> None:
    for row, (seq, token_id) in enumerate(zip(rows, ids.wait().tolist(), strict=True)):
        if token_id < 0:
            raise InternalError(f"row {row} of {len(rows)}: no logit is finite, no token can be drawn")
        if not seq.is_stopped:
            seq.output_ids.append(token_id)
