"""Drives an engine without a scheduler: sequences get blocks in scattered order and advance as the caller says."""

from __future__ import annotations

import random

from ..core.ids import AttemptKey, BlockId
from ..engine.interface import Engine, ScheduledSeq
from ..engine.sequence import Sequence, blocks_for
from ..protocol.messages import SampledToken
from ..protocol.sampling import SamplingParams


class Stepper:
    """Sequences over the blocks of one pool.

    Block ids are dealt out in a seeded random order, so neighbours never touch.
    """

    def __init__(self, num_blocks: int, block_size: int, seed: int = 0) -> None:
        self.block_size = block_size
        self.free = [BlockId(i) for i in range(num_blocks)]
        random.Random(seed).shuffle(self.free)
        self._count = 0

    def add(
        self, prompt_ids: list[int], params: SamplingParams | None = None, output_ids: list[int] | None = None
    ) -> Sequence:
        """A sequence that has computed nothing yet."""
        self._count += 1
        greedy = SamplingParams(temperature=0, ignore_eos=True)
        return Sequence(
            AttemptKey(f"seq-{self._count}", 0), 0, list(prompt_ids), params or greedy, b"", 0.0, 1e9, output_ids or []
        )

    def schedule(self, seq: Sequence, num_new_tokens: int | None = None) -> ScheduledSeq:
        """The next `num_new_tokens` tokens of `seq` (by default all that are left), with blocks for them."""
        count = seq.num_uncomputed_tokens if num_new_tokens is None else min(num_new_tokens, seq.num_uncomputed_tokens)
        missing = blocks_for(seq.num_computed_tokens + count, self.block_size) - len(seq.block_table)
        seq.block_table += [self.free.pop() for _ in range(missing)]
        return ScheduledSeq(seq, count)

    def commit(self, entries: list[ScheduledSeq], results: list[tuple[SampledToken, ...]]) -> None:
        """Advance every sequence; a sampled token of its own choice is appended."""
        for entry, tokens in zip(entries, results, strict=True):
            entry.seq.num_computed_tokens += entry.num_new_tokens
            entry.seq.output_ids += [token.token_id for token in tokens[:1]]

    def release(self, seq: Sequence) -> None:
        """Give the blocks back, to be dealt out next."""
        self.free += seq.block_table
        seq.block_table = []

    def generate(self, engine: Engine, seqs: list[Sequence], num_tokens: int, chunk: int | None = None) -> None:
        """Run all of `seqs` together until each has `num_tokens` output tokens; prompts in chunks of `chunk`."""
        while waiting := [seq for seq in seqs if len(seq.output_ids) < num_tokens]:
            entries = [self.schedule(seq, chunk) for seq in waiting]
            self.commit(entries, engine.execute(entries))
