"""The suffix automaton against its definition, tried on all parts of small texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.speculation.suffix_automaton import ROOT, Match, SuffixAutomaton, follow

TEXTS = st.lists(st.integers(0, 2), max_size=24)


def occurrences(text: list[int], part: list[int]) -> int:
    return sum(text[at : at + len(part)] == part for at in range(len(text) - len(part) + 1))


def longest_repeated_ending(text: list[int]) -> int:
    return max((n for n in range(len(text)) if occurrences(text, text[len(text) - n :]) > 1), default=0)


def longest_known_ending(text: list[int], known: list[int]) -> int:
    return max(n for n in range(len(text) + 1) if n == 0 or occurrences(known, text[len(text) - n :]))


def grown(text: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    automaton.extend(text)
    return automaton


@given(TEXTS)
def test_link_of_the_last_state_is_the_longest_repeated_ending(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for at, token in enumerate(text, 1):
        automaton.extend([token])
        link = automaton.links[automaton.last]
        assert automaton.lengths[link] == longest_repeated_ending(text[:at])
    assert automaton.num_tokens == len(text)


@given(TEXTS.filter(bool))
def test_counts_are_occurrences(text: list[int]) -> None:
    automaton = grown(text)
    for begin in range(len(text)):
        state = ROOT
        for end in range(begin, len(text)):
            state = automaton.nexts[state][text[end]]
            assert automaton.counts[state] == occurrences(text, text[begin : end + 1])


@given(TEXTS, TEXTS, TEXTS)
def test_match_is_the_longest_known_ending_also_when_what_is_known_grows(
    known: list[int], more: list[int], text: list[int]
) -> None:
    automaton, match = grown(known), Match()
    half = len(text) // 2
    match.extend(automaton, text[:half])
    assert match.length == longest_known_ending(text[:half], known)
    automaton.extend(more)
    match.extend(automaton, text[half:])
    # An ending that only the new part knows whole may be found shorter: it was matched before that came.
    assert longest_known_ending(text, known) <= match.length <= longest_known_ending(text, known + more)


def test_follow_takes_what_came_most_often_and_says_how_often() -> None:
    automaton = grown([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2])
    state = automaton.links[automaton.last]
    steps = follow(automaton, state, automaton.lengths[state], 3)
    assert [(step.token_id, step.length) for step in steps] == [(3, 2), (8, 3), (1, 4)]
    assert [step.share for step in steps] == pytest.approx([2 / 3, 1 / 2, 1])


def test_follow_ends_where_nothing_has_followed() -> None:
    assert follow(grown([5]), grown([5]).last, 1, 4) == []
