"""Whose draft, and how much of it: what makes the step yield most tokens per second.

Each token of a draft has a chance (`acceptance`); that it counts, all before it must be right too, so it is never
likelier than its parent. Over all sequences the likeliest tokens are taken first, and as many as raise

    (sequences + expected accepted tokens) / (seconds of such a step)

above what the step yields without any, by a margin. So drafts grow and shrink with each sequence's luck, and end where
the batch is large enough to fill the machine alone. What is declined for long is tried again with one token.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

from ...core.clock import Clock
from ..draft_tree import MAX_TREE_ROWS, ROOT, first_children
from ..interface import ScheduledSeq
from ..sequence import Sequence
from .acceptance import Acceptance, Corrections
from .interface import NOTHING, Draft, DraftCounts, Proposer
from .pauses import Pauses
from .step_cost import StepCost

MARGIN = 1.02
_SLOWNESS_RATE = 0.1
LEAST_REACH = 0.02  # of a tree's tokens: looking at less likely ones costs more than they bring
PROBE_EVERY = 64  # steps in which nothing is drafted though something could be


@dataclass(slots=True)
class _Offer:
    """The best draft for one sequence. reach: for each token, the chance that it and all it follows are right."""

    source: int
    draft: Draft
    reach: list[float]

    @property
    def expected(self) -> float:
        return sum(self.reach)


class Speculator:
    """Implements `Speculation`. A draft has `max_tokens` at most, and without `cost` as many as it may. `clock`: what
    making drafts takes counts too; without it counts for nothing. `takes_trees`: the engine does (`EngineSpec`).
    """

    def __init__(
        self,
        proposers: list[Proposer],
        max_tokens: int,
        cost: StepCost | None,
        clock: Clock | None = None,
        *,
        takes_trees: bool = True,
    ) -> None:
        self._pauses = Pauses(clock) if clock is not None and cost is not None else None
        self._clock, self._slowness = clock, [1.0] * len(proposers)  # against what the proposers say, by the clock
        self._proposers, self._max_tokens, self._cost = proposers, max_tokens, cost
        self._takes_trees = takes_trees
        self._acceptance = [Acceptance(proposer) for proposer in proposers]
        self._corrections: dict[Sequence, list[Corrections]] = {}
        self._drafted: dict[Sequence, tuple[int, Draft]] = {}
        self._declined = 0
        self._draft_s = 0.0  # what the drafts of this step took a model to make
        self.counts = DraftCounts(positions=(0,) * max_tokens)

    # ---- drafting ----

    def draft(self, seqs: Sequences[Sequence], limits: Sequences[int], room: int) -> list[Draft]:
        """See `Speculation.draft`."""
        bounds = [min(limit, room, self._max_tokens) for limit in limits]
        self._draft_s = 0.0
        if not seqs or max(bounds) <= 0 or (self._pauses is not None and not self._pauses.begin()):
            return [NOTHING] * len(seqs)
        offers = self._offers(seqs, bounds)
        chosen, saved_s = self._chosen(seqs, offers, room)
        if self._pauses is not None:
            self._pauses.end(saved_s, self._draft_s)
        return [self._take(seq, offer, places) for seq, offer, places in zip(seqs, offers, chosen, strict=True)]

    def _offers(self, seqs: Sequences[Sequence], bounds: Sequences[int]) -> list[_Offer]:
        best = [_Offer(0, NOTHING, [])] * len(seqs)
        for source in range(len(self._proposers)):
            limits, predicted_s = self._affordable(source, seqs, bounds, best)
            if not any(limits):
                continue
            for place, draft in enumerate(self._make(source, seqs, limits, predicted_s)):
                offer = self._offer(seqs[place], source, draft, bounds[place])
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

    def _offer(self, seq: Sequence, source: int, draft: Draft, bound: int) -> _Offer:
        """`draft` as far as the engine takes it: of a tree the likeliest tokens."""
        draft = draft if self._takes_trees else draft.trunk()
        if not draft.parents:
            return _Offer(source, draft, self._reach(seq, source, draft))
        reach = self._reach(seq, source, draft)
        least = LEAST_REACH if self._cost is not None else 0.0
        places = [place for place, chance in enumerate(reach) if chance >= least]
        bound = min(bound, MAX_TREE_ROWS - 1)
        if len(places) > bound:  # stable: a parent before its children
            places = sorted(sorted(places, key=lambda place: -reach[place])[:bound])
        if len(places) == len(draft):
            return _Offer(source, draft, reach)
        return _Offer(source, draft.only(places), [reach[place] for place in places])

    def _reach(self, seq: Sequence, source: int, draft: Draft) -> list[float]:
        corrections, acceptance = self._corrections_of(seq, source), self._acceptance[source]
        reach: list[float] = []
        chance = 1.0
        if not draft.parents:
            for kind in draft.kinds:
                chance *= acceptance.chance(kind, corrections.first)
                reach.append(chance)
            return reach
        for kind, parent, is_first in zip(draft.kinds, draft.parents, first_children(draft.parents), strict=True):
            before = 1.0 if parent == ROOT else reach[parent]
            reach.append(before * acceptance.chance(kind, corrections.of(is_first)))
        return reach

    def _corrections_of(self, seq: Sequence, source: int) -> Corrections:
        return self._corrections.setdefault(seq, [Corrections() for _ in self._proposers])[source]

    def _chosen(self, seqs: Sequences[Sequence], offers: list[_Offer], room: int) -> tuple[list[list[int]], float]:
        """Which tokens of each offer are taken, and the seconds that this is expected to save."""
        likeliest = sorted(
            ((chance, n, place) for n, offer in enumerate(offers) for place, chance in enumerate(offer.reach)),
            key=lambda item: -item[0],  # stable: of one draft a parent comes before its children
        )[: max(room, 0)]
        chosen: list[list[int]] = [[] for _ in offers]
        number, saved_s = self._best_number(seqs, likeliest)
        for _, n, place in likeliest[:number]:
            chosen[n].append(place)
        return chosen, saved_s

    def _best_number(self, seqs: Sequences[Sequence], likeliest: list[tuple[float, int, int]]) -> tuple[int, float]:
        """How many of the likeliest tokens to take, and what that saves."""
        if self._cost is None or not likeliest:
            return len(likeliest), 0.0
        cached = [seq.num_tokens for seq in seqs]
        num_cached, further, expected = sum(cached), 0, float(len(seqs))
        plain = self._cost.seconds(len(seqs), num_cached, 0) / expected
        best, least, saved_s = 0, plain / MARGIN, 0.0
        for number, (chance, n, _) in enumerate(likeliest, 1):
            expected += chance
            further += cached[n]
            seconds = self._cost.seconds(len(seqs) + number, num_cached, further)
            if seconds / expected < least:
                best, least, saved_s = number, seconds / expected, plain * expected - seconds
        return best or self._probe(), saved_s

    def _probe(self) -> int:
        self._declined += 1
        return int(self._declined % PROBE_EVERY == 0)

    def _take(self, seq: Sequence, offer: _Offer, places: list[int]) -> Draft:
        if not places:
            return NOTHING
        draft = offer.draft.only(sorted(places)) if offer.draft.parents else offer.draft[: len(places)]
        self._drafted[seq] = (offer.source, draft)
        return draft

    # ---- learning ----

    def verified(self, seq: Sequence, num_drafted: int, path: tuple[int, ...]) -> None:
        """See `Speculation.verified`."""
        source, drafted = self._drafted.pop(seq, (0, NOTHING))
        self._learn(seq, source, drafted[:num_drafted], path)
        counts = self.counts
        counts.drafts += 1
        counts.drafted += num_drafted
        counts.accepted += len(path)
        counts.positions = tuple(count + (place < len(path)) for place, count in enumerate(counts.positions))

    def _learn(self, seq: Sequence, source: int, draft: Draft, path: tuple[int, ...]) -> None:
        """From the tokens whose parents were right: of others nobody knows."""
        corrections, acceptance = self._corrections_of(seq, source), self._acceptance[source]
        if not draft.parents:
            for place, kind in enumerate(draft.kinds[: len(path) + 1]):
                acceptance.note(kind, corrections, is_right=place < len(path))
            return
        firsts = first_children(draft.parents)
        for place, (kind, parent) in enumerate(zip(draft.kinds, draft.parents, strict=True)):
            if parent == ROOT or parent in path:
                acceptance.note(kind, corrections, is_right=place in path, is_first=firsts[place])

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
