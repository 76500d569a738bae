"""Whose draft, and how much of it: what makes the step yield most tokens per second.

Each token of a draft has a chance (`acceptance`); that it counts, all before it must be right too. Over all sequences
the likeliest tokens are taken first, and as many as raise

    (sequences + expected accepted tokens) / (seconds of such a step)

above what the step yields without any, by a margin. So drafts grow and shrink with each sequence's luck, and end where
the batch is large enough to fill the machine alone. What is declined for long is tried again with one token.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

from ...core.clock import Clock
from ..interface import ScheduledSeq
from ..sequence import Sequence
from .acceptance import Acceptance, Correction
from .interface import NO_DRAFT, NOTHING, Draft, DraftCounts, Proposer
from .pauses import Pauses
from .step_cost import StepCost

MARGIN = 1.02
_SLOWNESS_RATE = 0.1
PROBE_EVERY = 64  # steps in which nothing is drafted though something could be


@dataclass(slots=True)
class _Offer:
    """The best draft for one sequence. reach: for each token, the chance that it and all before it are right."""

    source: int
    draft: Draft
    reach: list[float]

    @property
    def expected(self) -> float:
        return sum(self.reach)


class Speculator:
    """Implements `Speculation`. Without `cost` each draft is as long as it may be. `clock`: what making drafts takes
    counts too; without it counts for nothing.
    """

    def __init__(
        self, proposers: list[Proposer], max_tokens: int, cost: StepCost | None, clock: Clock | None = None
    ) -> None:
        self._pauses = Pauses(clock) if clock is not None and cost is not None else None
        self._clock, self._slowness = clock, [1.0] * len(proposers)  # against what the proposers say, by the clock
        self._proposers, self._max_tokens, self._cost = proposers, max_tokens, cost
        self._acceptance = [Acceptance(proposer) for proposer in proposers]
        self._corrections: dict[Sequence, list[Correction]] = {}
        self._drafted: dict[Sequence, tuple[int, Draft]] = {}
        self._declined = 0
        self._draft_s = 0.0  # what the drafts of this step took a model to make
        self.counts = DraftCounts(positions=(0,) * max_tokens)

    # ---- drafting ----

    def draft(self, seqs: Sequences[Sequence], limits: Sequences[int], room: int) -> list[tuple[int, ...]]:
        """See `Speculation.draft`."""
        bounds = [min(limit, room, self._max_tokens) for limit in limits]
        self._draft_s = 0.0
        if not seqs or max(bounds) <= 0 or (self._pauses is not None and not self._pauses.begin()):
            return [NO_DRAFT] * len(seqs)
        offers = self._offers(seqs, bounds)
        lengths, saved_s = self._lengths(seqs, offers, room)
        if self._pauses is not None:
            self._pauses.end(saved_s, self._draft_s)
        return [self._take(seq, offer, n) for seq, offer, n in zip(seqs, offers, lengths, strict=True)]

    def _offers(self, seqs: Sequences[Sequence], bounds: Sequences[int]) -> list[_Offer]:
        best = [_Offer(0, NOTHING, [])] * len(seqs)
        for source in range(len(self._proposers)):
            limits, predicted_s = self._affordable(source, seqs, bounds, best)
            if not any(limits):
                continue
            for place, draft in enumerate(self._make(source, seqs, limits, predicted_s)):
                offer = _Offer(source, draft, self._reach(seqs[place], source, draft))
                if offer.expected > best[place].expected:
                    best[place] = offer
        return best

    def _make(self, source: int, seqs: Sequences[Sequence], limits: Sequences[int], predicted_s: float) -> list[Draft]:
        """The drafts of a proposer, which are said to take so long. What they do take says more of the next ones."""
        proposer = self._proposers[source]
        if self._clock is None or not predicted_s:
            self._draft_s += predicted_s
            return proposer.propose(seqs, limits)
        began = self._clock.now()
        drafts = proposer.propose(seqs, limits)
        taken_s = self._clock.now() - began
        self._draft_s += taken_s
        self._slowness[source] *= min(max(taken_s / predicted_s, 0.25), 4.0) ** _SLOWNESS_RATE
        return drafts

    def _affordable(
        self, source: int, seqs: Sequences[Sequence], bounds: Sequences[int], best: list[_Offer]
    ) -> tuple[Sequences[int], float]:
        """How long drafts of this proposer may be to pay for being made, beside the offers that there are; and the
        seconds that making them takes.
        """
        num_cached = sum(seq.num_tokens for seq in seqs)
        each = self._proposers[source].seconds(len(seqs), num_cached)
        if self._cost is None or not each:
            return bounds, 0.0
        each *= self._cost.scale if self._clock is None else self._slowness[source]
        mean = self._acceptance[source].mean
        length, expected = 0, 1.0
        most = MARGIN / self._cost.seconds(len(seqs), num_cached, 0)
        for number in range(1, self._max_tokens + 1):
            expected += mean**number
            step_s = self._cost.seconds(len(seqs) * (1 + number), num_cached, num_cached * number)
            rate = expected / (step_s + number * each)
            if rate > most:
                length, most = number, rate
        length = length or self._probe()
        gain = sum(mean**number for number in range(1, length + 1))
        limits = [min(bound, length) if offer.expected < gain else 0 for bound, offer in zip(bounds, best, strict=True)]
        return limits, length * each

    def _reach(self, seq: Sequence, source: int, draft: Draft) -> list[float]:
        correction, acceptance = self._correction(seq, source), self._acceptance[source]
        reach: list[float] = []
        chance = 1.0
        for kind in draft.kinds:
            chance *= acceptance.chance(kind, correction)
            reach.append(chance)
        return reach

    def _correction(self, seq: Sequence, source: int) -> Correction:
        return self._corrections.setdefault(seq, [Correction() for _ in self._proposers])[source]

    def _lengths(self, seqs: Sequences[Sequence], offers: list[_Offer], room: int) -> tuple[list[int], float]:
        """How much of each offer is taken, and the seconds that this is expected to save."""
        likeliest = sorted(
            ((chance, place) for place, offer in enumerate(offers) for chance in offer.reach),
            key=lambda item: -item[0],  # stable: of one draft the earlier tokens come first
        )[: max(room, 0)]
        lengths = [0] * len(offers)
        number, saved_s = self._best_number(seqs, likeliest)
        for _, place in likeliest[:number]:
            lengths[place] += 1
        return lengths, saved_s

    def _best_number(self, seqs: Sequences[Sequence], likeliest: list[tuple[float, int]]) -> tuple[int, float]:
        """How many of the likeliest tokens to take, and what that saves."""
        if self._cost is None or not likeliest:
            return len(likeliest), 0.0
        cached = [seq.num_tokens for seq in seqs]
        num_cached, further, expected = sum(cached), 0, float(len(seqs))
        plain = self._cost.seconds(len(seqs), num_cached, 0) / expected
        best, least, saved_s = 0, plain / MARGIN, 0.0
        for number, (chance, place) in enumerate(likeliest, 1):
            expected += chance
            further += cached[place]
            seconds = self._cost.seconds(len(seqs) + number, num_cached, further)
            if seconds / expected < least:
                best, least, saved_s = number, seconds / expected, plain * expected - seconds
        return best or self._probe(), saved_s

    def _probe(self) -> int:
        self._declined += 1
        return int(self._declined % PROBE_EVERY == 0)

    def _take(self, seq: Sequence, offer: _Offer, length: int) -> tuple[int, ...]:
        if not length:
            return NO_DRAFT
        self._drafted[seq] = (offer.source, offer.draft)
        return offer.draft.token_ids[:length]

    # ---- learning ----

    def verified(self, seq: Sequence, draft: tuple[int, ...], num_accepted: int) -> None:
        """See `Speculation.verified`."""
        source, drafted = self._drafted.pop(seq, (0, NOTHING))
        correction = self._correction(seq, source)
        for place, kind in enumerate(drafted.kinds[: min(len(draft), num_accepted + 1)]):
            self._acceptance[source].note(kind, correction, is_right=place < num_accepted)
        counts = self.counts
        counts.drafts += 1
        counts.drafted += len(draft)
        counts.accepted += num_accepted
        counts.positions = tuple(count + (place < num_accepted) for place, count in enumerate(counts.positions))

    def note_step(self, entries: Sequences[ScheduledSeq], seconds: float) -> None:
        """See `Speculation.note_step`. Steps that prefill tell nothing of those that only decode."""
        if self._cost is None or not entries or any(entry.num_new_tokens > 1 for entry in entries):
            return
        cached = sum(entry.seq.num_tokens for entry in entries)
        further = sum(entry.seq.num_tokens * len(entry.draft) for entry in entries)
        self._cost.note(sum(entry.num_step_tokens for entry in entries), cached, further, seconds - self._draft_s)

    def forget(self, seq: Sequence) -> None:
        """See `Speculation.forget`."""
        self._corrections.pop(seq, None)
        self._drafted.pop(seq, None)
        for proposer in self._proposers:
            proposer.forget(seq)
