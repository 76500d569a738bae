"""What the proposers that need no model propose."""

from __future__ import annotations

import pytest

from penstock.core.ids import AttemptKey
from penstock.engine.sequence import Sequence
from penstock.engine.speculation.interface import Proposer
from penstock.engine.speculation.ngram import NgramProposer
from penstock.engine.speculation.suffix import MAX_NEW_TOKENS, MAX_TENANT_TOKENS, MAX_TENANTS, SuffixProposer
from penstock.protocol.sampling import SamplingParams

PROPOSERS = [NgramProposer, SuffixProposer]


def sequence(prompt: list[int], output: list[int] | None = None, tenant: bytes = b"one") -> Sequence:
    return Sequence(AttemptKey("r", 0), 0, prompt, SamplingParams(max_tokens=99), tenant, 0.0, 1.0, output or [])


def propose(proposer: Proposer, seq: Sequence, limit: int = 4) -> tuple[int, ...]:
    (draft,) = proposer.propose([seq], [limit])
    assert len(draft.kinds) == len(draft.token_ids) <= limit
    assert all(0 <= kind < proposer.num_kinds for kind in draft.kinds)
    assert all(proposer.first_guess(kind) > 0 for kind in draft.kinds)
    return draft.token_ids


@pytest.mark.parametrize("make", PROPOSERS)
def test_what_was_there_before_goes_on_as_it_did(make: type[Proposer]) -> None:
    seq = sequence([1, 2, 3, 4, 5, 6, 7, 8, 2, 3], [4])
    assert propose(make(), seq) == (5, 6, 7, 8)
    assert propose(make(), seq, limit=2) == (5, 6)
    assert propose(make(), seq, limit=0) == ()


@pytest.mark.parametrize("make", PROPOSERS)
def test_nothing_is_proposed_where_nothing_repeats(make: type[Proposer]) -> None:
    assert propose(make(), sequence(list(range(40)))) == ()
    assert propose(make(), sequence([7])) == ()


@pytest.mark.parametrize("make", PROPOSERS)
def test_proposals_follow_the_output_as_it_grows(make: type[Proposer]) -> None:
    proposer, seq = make(), sequence([1, 2, 3, 4, 9, 8])
    assert propose(proposer, seq) == ()
    seq.output_ids += [1, 2]
    assert propose(proposer, seq) == (3, 4, 9, 8)
    seq.output_ids += [3, 5, 3]
    assert propose(proposer, seq) == ()
    seq.output_ids += [5]
    assert propose(proposer, seq, limit=1) == (3,)


@pytest.mark.parametrize("make", PROPOSERS)
def test_a_proposer_that_comes_late_proposes_the_same(make: type[Proposer]) -> None:
    """After a hand-off or a failover all is built again from the tokens."""
    early, seq = make(), sequence([1, 2, 3, 1, 2, 3, 1])
    for token in (2, 3, 4, 1, 2, 3, 4, 1, 2):
        seq.output_ids.append(token)
        assert propose(early, seq) == propose(make(), seq)


def test_ngram_prefers_the_longest_and_then_the_latest() -> None:
    assert propose(NgramProposer(), sequence([1, 2, 3, 50, 2, 3, 60, 2, 3, 70, 1, 2, 3]), 1) == (50,)
    assert propose(NgramProposer(), sequence([2, 3, 60, 2, 3, 70, 2, 3]), 1) == (70,)


def test_suffix_learns_from_the_answers_of_its_tenant_alone() -> None:
    proposer = SuffixProposer()
    first = sequence([1], [10, 11, 12, 13, 14])
    propose(proposer, first)
    proposer.forget(first)
    assert propose(proposer, sequence([2], [10, 11]), 3) == (12, 13, 14)
    assert propose(proposer, sequence([2], [10, 11], tenant=b"two"), 3) == ()
    alone = SuffixProposer(shares_outputs=False)
    propose(alone, first)
    alone.forget(first)
    assert propose(alone, sequence([2], [10, 11]), 3) == ()


def test_suffix_takes_the_longer_of_two_matches() -> None:
    proposer = SuffixProposer()
    first = sequence([1], [5, 6, 7, 8])
    propose(proposer, first)
    proposer.forget(first)
    assert propose(proposer, sequence([6, 7, 90, 5, 6, 7]), 1) == (8,)
    assert propose(proposer, sequence([5, 6, 7, 90, 5, 6, 7]), 1) == (90,)


def test_suffix_indexes_a_long_prompt_over_several_steps() -> None:
    proposer, seq = SuffixProposer(), sequence([1, 2, *range(100, 100 + 2 * MAX_NEW_TOKENS), 1, 2])
    found = [propose(proposer, seq, 2) for _ in range(4)]
    assert found == [(), (), (100, 101), (100, 101)]


def test_suffix_bounds_what_it_remembers() -> None:
    proposer = SuffixProposer()
    for number in range(MAX_TENANTS + 3):
        seq = sequence([1], [number] * 8, tenant=bytes([number]))
        propose(proposer, seq)
        proposer.forget(seq)
    assert len(proposer._tenants) == MAX_TENANTS
    for number in range(4):
        seq = sequence([1], list(range(MAX_TENANT_TOKENS // 2 + number)))
        propose(proposer, seq)
        proposer.forget(seq)
        assert proposer._tenants[b"one"].num_tokens <= MAX_TENANT_TOKENS
    assert not proposer._own
