"""Incremental detokenization against the decoding of everything at once, and stop strings against a plain scan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import BadRequest
from penstock.models.text_stream import TextDelta, TextStream

SPECIAL = 300
WORDS = 301  # ids from here on stand for these texts
TEXTS = ["ab", "aab", "bab", "日本", "👩‍👩‍👧", " the", "\n\n", "é"]


class ByteVocab:
    """Ids 0 to 255 are bytes, 300 is special, then a few words."""

    special_ids = frozenset({SPECIAL})

    def token_bytes(self, token_id: int) -> bytes:
        if token_id == SPECIAL:
            return b"<|end|>"
        return bytes([token_id]) if token_id < 256 else TEXTS[token_id - WORDS].encode()


def decode(token_ids: Sequence[int]) -> str:
    vocab = ByteVocab()
    return b"".join(vocab.token_bytes(i) for i in token_ids if i != SPECIAL).decode("utf-8", errors="replace")


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def run(stream: TextStream, chunks: Sequence[Sequence[int]]) -> list[TextDelta]:
    return [*(stream.feed(chunk) for chunk in chunks), stream.finish()]


def text_of(deltas: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


token_ids = st.lists(st.one_of(st.integers(0, 255), st.just(SPECIAL), st.integers(WORDS, WORDS + len(TEXTS) - 1)))
cuts = st.lists(st.integers(0, 60), max_size=6)
stops = st.lists(st.text(alphabet="ab日é\n", min_size=1, max_size=4), max_size=3)


def chunked(ids: Sequence[int], at: Sequence[int]) -> list[list[int]]:
    edges = [0, *sorted(min(cut, len(ids)) for cut in at), len(ids)]
    return [list(ids[start:end]) for start, end in pairwise(edges)]


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Where the text ends and why, by reading one character after the other."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            longest = max(hits, key=len)
            return end - len(longest), longest
    return None


@given(token_ids, cuts)
def test_stream_any_chunks_equals_full_decode(ids: list[int], at: list[int]) -> None:
    deltas = run(TextStream(ByteVocab()), chunked(ids, at))
    assert text_of(deltas) == decode(ids)
    assert sum(delta.num_tokens for delta in deltas) == len(ids)


@given(st.text(alphabet="aé日👩\u200d", max_size=20))
def test_stream_valid_text_byte_by_byte_never_shows_replacement(text: str) -> None:
    stream = TextStream(ByteVocab())
    assert "".join(stream.feed([byte]).text for byte in text.encode()) == text
    assert stream.finish().text == ""


@settings(max_examples=300)
@given(token_ids, cuts, stops)
def test_stream_with_stops_equals_plain_scan(ids: list[int], at: list[int], stop: list[str]) -> None:
    stream = TextStream(ByteVocab(), stop)
    deltas = run(stream, chunked(ids, at))
    full = decode(ids)
    hit = first_stop(full, stop)
    assert text_of(deltas) == (full if hit is None else full[: hit[0]])
    assert stream.stopped == (None if hit is None else hit[1])


@given(st.lists(st.integers(WORDS, WORDS + 2), max_size=12), stops)
def test_stream_held_text_is_longest_possible_stop_prefix(ids: list[int], stop: list[str]) -> None:
    stream = TextStream(ByteVocab(), stop)
    sent = "".join(stream.feed([i]).text for i in ids)
    if stream.stopped is None:
        held = decode(ids)[len(sent) :]
        possible = [n for s in stop for n in range(1, len(s)) if decode(ids).endswith(s[:n])]
        assert len(held) == max(possible, default=0)


def test_stream_stop_spanning_tokens_is_cut_out_and_counted() -> None:
    stream = TextStream(ByteVocab(), ["END"])
    assert stream.feed(ids_of("xE")).text == "x"
    delta = stream.feed(ids_of("NDmore"))
    assert (delta.text, delta.stopped, delta.num_tokens) == ("", "END", 2)
    assert stream.num_tokens == 4
    assert stream.feed(ids_of("more")) == TextDelta(stopped="END")
    assert stream.finish() == TextDelta(stopped="END")


def test_stream_include_stop_keeps_it_and_drops_the_rest() -> None:
    stream = TextStream(ByteVocab(), ["日"], include_stop=True)
    deltas = [stream.feed([byte]) for byte in "a日b".encode()]
    assert text_of(deltas) == "a日"
    assert stream.num_tokens == 4


def test_stream_two_stops_first_complete_one_wins() -> None:
    stream = TextStream(ByteVocab(), ["cd", "b"])
    assert stream.feed(ids_of("abcd")) == TextDelta("a", "b", 2, [(0, 0), (1, 1)])


def test_stream_two_stops_ending_together_longer_one_wins() -> None:
    stream = TextStream(ByteVocab(), ["b", "ab"])
    assert stream.feed(ids_of("xab")).text == "x"
    assert stream.stopped == "ab"


def test_stream_false_start_of_stop_is_sent_at_finish() -> None:
    stream = TextStream(ByteVocab(), ["aab"])
    assert stream.feed(ids_of("aa")).text == ""
    assert stream.feed(ids_of("a")).text == "a"
    assert stream.finish().text == "aa"
    assert stream.finish().text == ""


def test_stream_stop_before_min_tokens_is_ordinary_text() -> None:
    stream = TextStream(ByteVocab(), ["ab"], min_tokens=4)
    assert stream.feed(ids_of("abxab")) == TextDelta("abx", "ab", 5, [(i, i) for i in range(5)])


def test_stream_stop_completed_by_the_last_of_min_tokens_counts() -> None:
    assert TextStream(ByteVocab(), ["ab"], min_tokens=2).feed(ids_of("ab")).stopped == "ab"
    overlapping = TextStream(ByteVocab(), ["aa"], min_tokens=3)
    assert overlapping.feed(ids_of("aaa")) == TextDelta("a", "aa", 3, [(0, 0), (1, 1), (2, 2)])


def test_stream_half_a_character_becomes_replacement_only_at_finish() -> None:
    stream = TextStream(ByteVocab())
    assert stream.feed("日".encode()[:2]).text == ""
    assert stream.finish().text == "\ufffd"


def test_stream_special_token_shown_only_when_asked() -> None:
    assert text_of(run(TextStream(ByteVocab()), [[SPECIAL]])) == ""
    assert text_of(run(TextStream(ByteVocab(), skip_special_tokens=False), [[SPECIAL]])) == "<|end|>"


def test_stream_token_offsets_count_whole_characters_before_each_token() -> None:
    stream = TextStream(ByteVocab(), ["zz"])
    offsets = [pair for byte in "é日z".encode() for pair in stream.feed([byte]).token_offsets]
    assert offsets == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1), (5, 2)]


def test_stream_empty_stop_string_is_refused() -> None:
    with pytest.raises(BadRequest, match="empty string"):
        TextStream(ByteVocab(), ["x", ""])
