"""Prompt lookup: what came behind the last few tokens the last time that they were there (Saxena, 2023)."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

from ..sequence import Sequence
from .interface import NOTHING, Draft

LONGEST, SHORTEST = 4, 2


@dataclass(slots=True)
class _Index:
    """places: n-gram → where the token behind its latest occurrence stands."""

    tokens: list[int] = field(default_factory=list)
    places: dict[tuple[int, ...], int] = field(default_factory=dict)

    def catch_up(self, seq: Sequence) -> None:
        """Index all n-grams but those that end with the last token, which nothing follows yet."""
        begin = len(self.tokens)
        self.tokens += seq.tokens(begin, seq.num_tokens)
        for end in range(max(begin, SHORTEST), len(self.tokens)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self.places[tuple(self.tokens[end - size : end])] = end

    def find(self) -> tuple[int, int]:
        """(where it goes on, size) of the longest n-gram at the end that was there before; size 0 when none was."""
        for size in range(min(LONGEST, len(self.tokens)), SHORTEST - 1, -1):
            place = self.places.get(tuple(self.tokens[-size:]))
            if place is not None:
                return place, size
        return 0, 0


class NgramProposer:
    """Looks within the sequence alone: its prompt and its output."""

    name = "ngram"
    num_kinds = LONGEST + 1

    def __init__(self) -> None:
        self._indexes: dict[Sequence, _Index] = {}

    def seconds(self, num_seqs: int, num_cached: int) -> float:
        return 0.0

    def first_guess(self, kind: int) -> float:
        return 0.3 + 0.1 * kind

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        """See `Proposer.propose`. Kinds are sizes of the n-gram in front of a token, as far as all of it was right."""
        return [self._propose(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]

    def _propose(self, seq: Sequence, limit: int) -> Draft:
        index = self._indexes.setdefault(seq, _Index())
        index.catch_up(seq)
        place, size = index.find()
        token_ids = tuple(index.tokens[place : place + limit]) if size else ()
        return Draft(token_ids, tuple(min(size + n, LONGEST) for n in range(len(token_ids)))) if token_ids else NOTHING

    def forget(self, seq: Sequence) -> None:
        self._indexes.pop(seq, None)
