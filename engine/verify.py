"""Which drafted tokens a sequence goes on with: those that it draws anyway.

Each row of a draft is sampled as the plain step would sample it: behind the same tokens, with the same rules, by the
same race (`engine.race`). A drafted token that is the one drawn is accepted, the first that is not ends the draft, and
what was drawn in its place is the next token. So a stream with drafts is the stream without them, token by token, also
under sampling, and goes on the same wherever it is resumed. A draft names one token, and that is accepted with its own
probability: min(1, p/q) of rejection sampling (Leviathan et al., ICML 2023) for a q of 1 (docs/adr/015).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..kernels.decoder_step.op import StepLogits
from ..protocol.messages import SampledToken
from .interface import ScheduledSeq
from .sampler import SampledRow, sample


@dataclass(slots=True)
class _Draws:
    """What an entry has drawn so far. `row`: that of its first token among the sampled rows."""

    entry: ScheduledSeq
    row: int
    tokens: list[SampledToken] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        """All tokens so far are as drafted, and there is a row for one more."""
        draft, count = self.entry.draft, len(self.tokens)
        return not count or (count <= len(draft) and self.tokens[-1].token_id == draft[count - 1])

    def rows(self, result: StepLogits) -> Iterator[SampledRow]:
        """The rows to be sampled next, which are surely needed: one, or for greedy ones without rules all of them."""
        seq, draft = self.entry.seq, self.entry.draft
        if not draft:
            yield from (SampledRow(self.row, seq, choice) for choice in seq.choices)
            return
        for place in range(len(self.tokens), len(draft) + 1):
            yield SampledRow(self.row + place, seq, seq.choice, draft[:place])
            if not seq.params.is_plain_greedy or place == len(draft) or result.best[self.row + place] != draft[place]:
                return


def draw(
    result: StepLogits, batch: list[ScheduledSeq], eos_token_ids: frozenset[int]
) -> list[tuple[SampledToken, ...]]:
    """The next tokens of each entry, out of what the step gave for `Batch.sampled_rows`; none where it does not sample.

    Raises InternalError as `sample` does; of a draft only rows that are reached count.
    """
    draws: list[_Draws] = []
    row = 0
    for entry in batch:
        draws.append(_Draws(entry, row))
        row += 1 + len(entry.draft) if entry.sample else 0
    waiting = [one for one in draws if one.entry.sample]
    while waiting:
        rows = [list(one.rows(result)) for one in waiting]
        tokens = iter(sample(result, [row for some in rows for row in some], eos_token_ids))
        for one, some in zip(waiting, rows, strict=True):
            one.tokens += [next(tokens) for _ in some]
        waiting = [one for one in waiting if one.entry.draft and one.is_open]
    return [tuple(one.tokens) for one in draws]
