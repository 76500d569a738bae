from __future__ import annotations

import random
from typing import Any

import pytest

from penstock.core.errors import InternalError
from penstock.gateway.choice import Choice
from penstock.gateway.requests import AnswerOptions
from penstock.protocol.messages import SampledToken, TokenLogprob
from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import TokensEvent

TEXT = "Stop, stap, store: é€😀 and a stoppage. "


class Bytes:
    vocab_size = 256
    special_ids: frozenset[int] = frozenset()

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def _choice(**options: Any) -> Choice:
    return Choice(0, Bytes(), SamplingParams(), AnswerOptions("toy", **options))  # type: ignore[arg-type]  # the part it uses


def _event(index: int, data: bytes, finish: Any = None) -> TokensEvent:
    return TokensEvent(0, index, tuple(SampledToken(b, TokenLogprob(-1.0)) for b in data), finish)


@pytest.mark.parametrize("seed", range(50))
def test_choice_says_the_same_however_tokens_are_cut(seed: int) -> None:
    rng = random.Random(seed)
    data = TEXT.encode()
    choice = _choice(stop=("stopp", "stoxx"), top_logprobs=0)
    text, entries, position = "", [], 0
    while position < len(data):
        size = rng.randrange(1, 8)
        finish = "length" if position + size >= len(data) else None
        delta = choice.take(_event(position, data[position : position + size], finish))
        position += size
        if delta is not None:
            text += delta.text
            entries += delta.entries
            assert all(entry.offset < len(text) for entry in entries), "an entry left before its text"
    assert text == TEXT[: TEXT.index("stopp")]
    assert b"".join(bytes(entry.chosen.bytes) for entry in entries).decode() == text
    assert choice.finish_reason == "stop"
    assert choice.num_tokens == data.index(b"stopp") + 5


def test_choice_that_skips_a_token_is_refused() -> None:
    choice = _choice()
    choice.take(_event(0, b"ab"))
    with pytest.raises(InternalError, match="token 3 came, 2 was next"):
        choice.take(_event(3, b"c"))


def test_choice_after_its_end_ignores_events() -> None:
    choice = _choice()
    choice.take(_event(0, b"ab", "length"))
    assert choice.take(_event(2, b"c")) is None
    assert choice.num_tokens == 2


def test_choice_at_the_end_gives_out_held_text() -> None:
    choice = _choice(stop=("abc",))
    assert choice.take(_event(0, b"ab")) is None
    delta = choice.take(_event(2, b"\xe2", "length"))
    assert delta is not None
    assert delta.text == "ab\ufffd"
