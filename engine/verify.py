"""Which drafted tokens a sequence goes on with: those that it draws anyway.

Each row of a draft is sampled as the plain step would sample it: behind the same tokens, with the same rules, by the
same race (`engine.race`). A drafted token that is the one drawn is accepted, and the rows behind it are looked at next;
where none of those drafted is, the draft ends, and what was drawn is the next token. So a stream with drafts is the
stream without them, token by token, also under sampling, and goes on the same wherever it is resumed. A drafted token
is accepted with its own probability: min(1, p/q) of rejection sampling (Leviathan et al., ICML 2023) for a q of 1
(docs/adr/015); several at one place with the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..kernels.decoder_step.op import StepLogits
from ..protocol.messages import SampledToken
from .draft_tree import ROOT, follow
from .interface import ScheduledSeq
from .sampler import SampledRow, sample


@dataclass(slots=True)
class _Draws:
    """What an entry has drawn so far. `row`: that of its first token among the sampled rows. `at`: the drafted token
    behind which it draws next; None when it has drawn another.
    """

    entry: ScheduledSeq
    row: int
    tokens: list[SampledToken] = field(default_factory=list)
    at: int | None = ROOT

    @property
    def is_open(self) -> bool:
        """There is a row for one more token."""
        return bool(self.entry.draft) and self.at is not None

    def take(self, token: SampledToken) -> None:
        self.tokens.append(token)
        if self.at is not None:
            self.at = follow(self.entry.draft, self.entry.parents, self.at, token.token_id)

    def rows(self, result: StepLogits) -> Iterator[SampledRow]:
        """The rows to be sampled next, which are surely needed: one, or for greedy ones without rules all of them."""
        entry, seq = self.entry, self.entry.seq
        if not entry.draft:
            yield from (SampledRow(self.row, seq, choice) for choice in seq.choices)
            return
        at, ahead = self.at, tuple(token.token_id for token in self.tokens)
        while at is not None:
            row = self.row + 1 + at
            yield SampledRow(row, seq, seq.choice, ahead)
            if not seq.params.is_plain_greedy:
                return
            best = int(result.best[row])
            at, ahead = follow(entry.draft, entry.parents, at, best), (*ahead, best)


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
            for _ in some:
                one.take(next(tokens))
        waiting = [one for one in waiting if one.is_open]
    return [tuple(one.tokens) for one in draws]
