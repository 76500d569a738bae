"""Drafts on the decode side: room for them in the sequences' tables, and what became of them."""

from __future__ import annotations

from ..engine.block_pool import BlockPool
from ..engine.draft_tree import path_of
from ..engine.interface import ScheduledSeq
from ..engine.sequence import Sequence, blocks_for
from ..engine.speculation.interface import DraftCounts, Speculation
from ..worker.role import Budget


class Drafting:
    """Without `speculation` nothing is drafted. Drafts never take a block that anything else waits for."""

    def __init__(self, pool: BlockPool, speculation: Speculation | None) -> None:
        self._pool, self._speculation = pool, speculation

    @property
    def counts(self) -> DraftCounts:
        return self._speculation.counts if self._speculation is not None else DraftCounts()

    def extend(self, entries: list[ScheduledSeq], budget: Budget, spare_blocks: int) -> list[ScheduledSeq]:
        """`entries`, which decode, with drafts as far as the budget and `spare_blocks` free blocks go."""
        if self._speculation is None or not entries:
            return entries
        seqs = [entry.seq for entry in entries]
        spare = max(0, spare_blocks)
        drafts = self._speculation.draft(seqs, [self._limit(seq, spare) for seq in seqs], budget.num_tokens)
        extended: list[ScheduledSeq] = []
        for entry, draft in zip(entries, drafts, strict=True):
            table = entry.seq.block_table
            draft, num_before = draft[: self._limit(entry.seq, spare)], len(table)
            self._pool.grow(table, entry.seq.num_tokens + len(draft))
            spare -= len(table) - num_before
            budget.num_tokens -= len(draft)
            extended.append(ScheduledSeq(entry.seq, entry.num_new_tokens, draft.token_ids, draft.parents))
        return extended

    def _limit(self, seq: Sequence, spare: int) -> int:
        """Tokens that fit behind those of `seq`, with one more that is drawn behind them."""
        if seq.sample_choices:
            return 0
        room = (len(seq.block_table) + spare) * self._pool.block_size - seq.num_tokens
        return max(0, min(room, seq.params.max_tokens - len(seq.output_ids) - 1))

    def settle(self, entry: ScheduledSeq, num_accepted: int) -> None:
        """Blocks that held nothing but what was not accepted are free again. `seq` has the accepted tokens by now, and
        their KV lies behind its own (`Engine.execute`).
        """
        if self._speculation is None or not entry.draft:
            return
        seq = entry.seq
        accepted = seq.tokens(seq.num_computed_tokens - num_accepted, seq.num_computed_tokens)
        self._speculation.verified(seq, len(entry.draft), path_of(entry.draft, entry.parents, accepted))
        keep = blocks_for(seq.num_tokens, self._pool.block_size)
        self._pool.free(seq.block_table[: keep - 1 : -1])
        del seq.block_table[keep:]

    def note_step(self, entries: list[ScheduledSeq], seconds: float) -> None:
        if self._speculation is not None:
            self._speculation.note_step(entries, seconds)

    def forget(self, seq: Sequence) -> None:
        if self._speculation is not None:
            self._speculation.forget(seq)
