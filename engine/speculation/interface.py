"""What drafts tokens, and what decides how many of them a step verifies. Pure: no clock, no tensors here.

Proposer      which tokens may follow a sequence, and how likely each is         ngram, suffix, a model
Speculation   for each step: whose drafts, how long                              control.Speculator
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Protocol

from ..interface import ScheduledSeq
from ..sequence import Sequence

MAX_DRAFT_TOKENS = 16
NO_DRAFT: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow. kinds: what the proposer knows about each, as a number of few values (`num_kinds`): how
    often tokens of a kind are right is counted (`acceptance`).
    """

    token_ids: tuple[int, ...]
    kinds: tuple[int, ...]


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
        """For each sequence at most so many tokens, which follow its last one."""
        ...

    def forget(self, seq: Sequence) -> None:
        """`seq` will not decode here any more. It may not be known."""
        ...


@dataclass(slots=True)
class DraftCounts:
    """drafts: steps of a sequence that had one. positions: how often the token at each place was accepted."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    positions: tuple[int, ...] = ()


class Speculation(Protocol):
    """What the decode role asks."""

    counts: DraftCounts

    def draft(self, seqs: Sequences[Sequence], limits: Sequences[int], room: int) -> list[tuple[int, ...]]:
        """Tokens to verify behind each of `seqs`, which decode in the next step: at most `limits` of them, `room` in
        all.
        """
        ...

    def verified(self, seq: Sequence, draft: tuple[int, ...], num_accepted: int) -> None:
        """So many tokens of what `draft` gave for `seq` were right, or the sequence has ended with them."""
        ...

    def note_step(self, entries: Sequences[ScheduledSeq], seconds: float) -> None:
        """A step of these entries took so long, what was drafted for it included."""
        ...

    def forget(self, seq: Sequence) -> None:
        """`seq` has ended or moved on."""
        ...
