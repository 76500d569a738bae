"""Every repeated part of a text, found while it grows: the suffix automaton (Blumer et al., TCS 1985).

A state stands for parts that end at the same places. Its link leads to the longest shorter ending that also occurs
elsewhere, so the link of the state of the whole text is the longest ending that the text has had before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

ROOT = 0
_DEEPEST = 64  # links that one token updates: more are only there in texts that repeat one token without end


@dataclass(slots=True)
class SuffixAutomaton:
    """Appending a token takes constant time on average. `counts`: how often a state's parts have occurred, up to the
    newest _DEEPEST of nested ones. Twin in the tests: the definition, tried on all parts.
    """

    nexts: list[dict[int, int]] = field(default_factory=lambda: [{}])
    links: list[int] = field(default_factory=lambda: [-1])
    lengths: list[int] = field(default_factory=lambda: [0])
    counts: list[int] = field(default_factory=lambda: [0])
    last: int = ROOT
    num_tokens: int = 0

    def extend(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self._append(token_id)

    def _append(self, token_id: int) -> None:
        nexts, links = self.nexts, self.links
        state = self._add(self.lengths[self.last] + 1, {}, ROOT, 0)
        at = self.last
        while at >= 0 and token_id not in nexts[at]:
            nexts[at][token_id] = state
            at = links[at]
        if at >= 0:
            links[state] = self._exact(at, token_id)
        self.last = state
        self.num_tokens += 1
        self._count(state)

    def _exact(self, at: int, token_id: int) -> int:
        """The state of what `at` followed by the token is, and of nothing longer; split off if there is none."""
        target, length = self.nexts[at][token_id], self.lengths[at] + 1
        if self.lengths[target] == length:
            return target
        clone = self._add(length, dict(self.nexts[target]), self.links[target], self.counts[target])
        while at >= 0 and self.nexts[at].get(token_id) == target:
            self.nexts[at][token_id] = clone
            at = self.links[at]
        self.links[target] = clone
        return clone

    def _add(self, length: int, nexts: dict[int, int], link: int, count: int) -> int:
        self.nexts.append(nexts)
        self.links.append(link)
        self.lengths.append(length)
        self.counts.append(count)
        return len(self.lengths) - 1

    def _count(self, state: int) -> None:
        for _ in range(_DEEPEST):
            if state <= ROOT:
                return
            self.counts[state] += 1
            state = self.links[state]


@dataclass(slots=True)
class Match:
    """The longest ending of some text that occurs in an automaton, as that text grows: a state, and how long it is."""

    state: int = ROOT
    length: int = 0

    def extend(self, automaton: SuffixAutomaton, token_ids: Iterable[int]) -> None:
        nexts, links, lengths = automaton.nexts, automaton.links, automaton.lengths
        for token_id in token_ids:
            # The automaton may have grown since, and split this state.
            while self.state != ROOT and self.length <= lengths[links[self.state]]:
                self.state = links[self.state]
            while self.state != ROOT and token_id not in nexts[self.state]:
                self.state = links[self.state]
                self.length = lengths[self.state]
            if token_id in nexts[self.state]:
                self.state = nexts[self.state][token_id]
                self.length += 1
            else:
                self.length = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One token that has followed: how long the part before it is, and in which share of its occurrences it did."""

    token_id: int
    length: int
    share: float


def follow(automaton: SuffixAutomaton, state: int, length: int, limit: int) -> list[Step]:
    """What has most often come behind the part at `state`, token by token; of two the later one."""
    nexts, counts = automaton.nexts, automaton.counts
    steps: list[Step] = []
    while len(steps) < limit and nexts[state]:
        token_id, following = max(nexts[state].items(), key=lambda item: (counts[item[1]], item[1]))
        total = sum(counts[other] for other in nexts[state].values())
        steps.append(Step(token_id, length, counts[following] / total if total else 0.0))
        state, length = following, length + 1
    return steps
