"""Drafts from suffix automatons: of the sequence itself, and of what was answered to others of the same tenant
(after SuffixDecoding, Oliaro et al., 2024). The longer match wins.

Tenants are told apart by the key of their prefix cache, which holds the salt: what one has been answered never shows in
the speed of another's answers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

from ..sequence import Sequence
from .interface import NOTHING, Draft
from .suffix_automaton import Match, Step, SuffixAutomaton, follow

SHORTEST = 2  # endings below are too common to say anything
LONGEST = 12  # longer ones are right as often
SHARES = 4  # kinds of a length, by how much of what has followed it went the same way
MAX_TENANTS, MAX_TENANT_TOKENS = 16, 1 << 15
MAX_NEW_TOKENS = 512  # of a sequence that one step looks at: a long prompt is indexed over several


@dataclass(slots=True)
class _Own:
    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    match: Match = field(default_factory=Match)  # in its tenant's automaton
    matched: SuffixAutomaton | None = None  # which that is: it is made anew when it is full


class SuffixProposer:
    """`shares_outputs`: learn from the answers of a tenant for its later ones."""

    name = "suffix"
    num_kinds = (LONGEST + 1) * SHARES

    def __init__(self, *, shares_outputs: bool = True) -> None:
        self._shares_outputs = shares_outputs
        self._own: dict[Sequence, _Own] = {}
        self._tenants: OrderedDict[bytes, SuffixAutomaton] = OrderedDict()  # least recently used first

    def seconds(self, num_seqs: int, num_cached: int) -> float:
        return 0.0

    def first_guess(self, kind: int) -> float:
        length, share = divmod(kind, SHARES)
        return (0.35 + 0.05 * length) * (1 + share) / SHARES

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        """See `Proposer.propose`. A kind is a match length with a share of its continuations."""
        return [self._propose(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]

    def _propose(self, seq: Sequence, limit: int) -> Draft:
        own = self._own.setdefault(seq, _Own())
        if not self._catch_up(own, seq) or limit <= 0:
            return NOTHING
        automaton, state = own.automaton, own.automaton.links[own.automaton.last]
        length = automaton.lengths[state] if state > 0 else 0
        if own.matched is not None and own.match.length > length:
            automaton, state, length = own.matched, own.match.state, own.match.length
        if length < SHORTEST:
            return NOTHING
        steps = follow(automaton, state, length, limit)
        return Draft(tuple(step.token_id for step in steps), tuple(map(_kind, steps)))

    def _catch_up(self, own: _Own, seq: Sequence) -> bool:
        """Whether all tokens of `seq` are indexed."""
        begin = own.automaton.num_tokens
        new = seq.tokens(begin, min(begin + MAX_NEW_TOKENS, seq.num_tokens))
        own.automaton.extend(new)
        tenant = self._tenants.get(seq.hash_key)
        if tenant is not own.matched:
            own.matched, own.match = tenant, Match()
            new = seq.tokens(max(0, own.automaton.num_tokens - 4 * LONGEST), own.automaton.num_tokens)
        if tenant is not None:
            own.match.extend(tenant, new)
        return own.automaton.num_tokens == seq.num_tokens

    def forget(self, seq: Sequence) -> None:
        """Ends `seq`; its output serves others of its tenant."""
        own = self._own.pop(seq, None)
        if own is None or not self._shares_outputs or not seq.output_ids:
            return
        tenant = self._tenants.get(seq.hash_key)
        if tenant is None or tenant.num_tokens + len(seq.output_ids) > MAX_TENANT_TOKENS:
            self._tenants[seq.hash_key] = tenant = SuffixAutomaton()
            if len(self._tenants) > MAX_TENANTS:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(seq.hash_key)
        tenant.extend(seq.output_ids[-MAX_TENANT_TOKENS:])


def _kind(step: Step) -> int:
    return min(step.length, LONGEST) * SHARES + min(int(step.share * SHARES), SHARES - 1)
