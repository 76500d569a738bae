"""What drafts tokens, and what decides how many of them a step verifies. Pure: no clock, no tensors here.

Proposer      which tokens may follow a sequence, and how likely each is         ngram, suffix, a model
Speculation   for each step: whose drafts, how long                              control.Speculator
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Protocol

from ..draft_tree import CHAIN, ROOT, Parents
from ..interface import ScheduledSeq
from ..sequence import Sequence

MAX_DRAFT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow, a chain or with `parents` a tree (`draft_tree`), of siblings the likeliest first. kinds:
    what the proposer knows about each, as a number of few values (`num_kinds`): how often tokens of a kind are right is
    counted (`acceptance`).
    """

    token_ids: tuple[int, ...]
    kinds: tuple[int, ...]
    parents: Parents = CHAIN

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, part: slice) -> Draft:
        return Draft(self.token_ids[part], self.kinds[part], self.parents[part])

    def only(self, places: Sequences[int]) -> Draft:
        """The tokens at `places`, ascending and closed under parents; a chain where that is what they are."""
        renumbered = {ROOT: ROOT} | {place: n for n, place in enumerate(places)}
        parents = tuple(renumbered[self.parents[place] if self.parents else place - 1] for place in places)
        return Draft(
            tuple(self.token_ids[place] for place in places),
            tuple(self.kinds[place] for place in places),
            CHAIN if parents == tuple(range(ROOT, len(places) - 1)) else parents,
        )

    def trunk(self) -> Draft:
        """The likeliest token, the likeliest behind it, and so on: a chain."""
        if not self.parents:
            return self
        places: list[int] = []
        for place, parent in enumerate(self.parents):
            if parent == (places[-1] if places else ROOT):
                places.append(place)
        return self.only(places)


NOTHING = Draft((), ())


class Proposer(Protocol):
    """Proposes tokens for sequences that decode. Output never depends on it, only speed does."""

    name: str
    num_kinds: int

    def seconds(self, num_seqs: int, num_cached: int) -> float:
        """What one further token takes, for each of so many sequences with so many cached tokens together. 0 where it
        does not count.
        """
        ...

    def first_guess(self, kind: int) -> float:
        """How likely a token of this kind is right, before any has been seen."""
        ...

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        """For each sequence tokens that follow its last one, at most so many one after another."""
        ...

    def forget(self, seq: Sequence) -> None:
        """`seq` will not decode here any more. It may not be known."""
        ...


@dataclass(slots=True)
class DraftCounts:
    """drafts: steps of a sequence that had one. positions: how often the first, second, … token of one was accepted."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    positions: tuple[int, ...] = ()


class Speculation(Protocol):
    """What the decode role asks."""

    counts: DraftCounts

    def draft(self, seqs: Sequences[Sequence], limits: Sequences[int], room: int) -> list[Draft]:
        """Tokens to verify behind each of `seqs`, which decode in the next step: at most `limits` of them, `room` in
        all.
        """
        ...

    def verified(self, seq: Sequence, num_drafted: int, path: tuple[int, ...]) -> None:
        """Of what `draft` gave for `seq` the first `num_drafted` tokens were computed, and those at the places `path`
        were right, one after another; or the sequence has ended with them.
        """
        ...

    def note_step(self, entries: Sequences[ScheduledSeq], seconds: float) -> None:
        """A step of these entries took so long, what was drafted for it included."""
        ...

    def forget(self, seq: Sequence) -> None:
        """`seq` has ended or moved on."""
        ...
