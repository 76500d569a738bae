"""Token ids in, text out: incremental detokenization of one choice, with stop strings.

The text of all deltas joined equals the decoding of all tokens at once, however the tokens are cut into calls. Text
never ends inside a character, and text that may still become a stop string is held back, no more of it than needed.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..core.errors import BadRequest


class TokenText(Protocol):
    """The part of a tokenizer that a stream needs."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(slots=True, frozen=True)
class TextDelta:
    """What one call adds.

    text: new text, to be sent as it is. stopped: the stop string that ended the choice, or None.
    num_tokens: tokens of this call that count, up to and including the one that completed the stop string.
    token_offsets: (index of the token in the choice, characters of text before it) for each counted token.
    """

    text: str = ""
    stopped: str | None = None
    num_tokens: int = 0
    token_offsets: list[tuple[int, int]] = field(default_factory=list)


class TextStream:
    """Text of one choice, as it follows the prompt. Cost per token does not grow with the length of the text.

    A stop string counts once `min_tokens` tokens are there (the one that completes it included). The one whose last
    character comes first wins, the longer of two that end together; so the result does not depend on how the text is
    cut into tokens. `include_stop` leaves it in the text. Special tokens are dropped unless `skip_special_tokens` is
    False. Raises BadRequest for an empty stop string.
    """

    def __init__(
        self,
        tokenizer: TokenText,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = [_StopString(text) for text in dict.fromkeys(stop)]
        self._include_stop = include_stop
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._min_tokens = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._num_chars = 0  # characters decoded so far, sent or held
        self._finished = False
        self.num_tokens = 0
        self.stopped: str | None = None

    def feed(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next tokens. After a stop string or `finish` every further token is ignored."""
        texts: list[str] = []
        offsets: list[tuple[int, int]] = []
        for token_id in token_ids:
            if self._finished:
                break
            offsets.append((self.num_tokens, self._num_chars))
            self.num_tokens += 1
            texts.append(self._take(self._decode(token_id)))
        return TextDelta("".join(texts), self.stopped, len(offsets), offsets)

    def finish(self) -> TextDelta:
        """Give out what is held; a character that never became whole turns into U+FFFD. Later calls give nothing."""
        if self._finished:
            return TextDelta(stopped=self.stopped)
        text = self._take(self._decoder.decode(b"", final=True))
        text += self._held
        self._held = ""
        self._finished = True
        return TextDelta(text, self.stopped)

    def _decode(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def _take(self, piece: str) -> str:
        """Add decoded text; return the part that can be sent."""
        self._num_chars += len(piece)
        if not self._stops:
            return piece
        window = self._held + piece
        hit = self._find_stop(piece)
        if hit is None:
            hold = max(stop.matched for stop in self._stops)
            self._held = window[len(window) - hold :]
            return window[: len(window) - hold]
        stop, end_in_piece = hit
        self.stopped, self._finished = stop.text, True
        end = len(self._held) + end_in_piece
        self._held = ""
        return window[: end if self._include_stop else end - len(stop.text)]

    def _find_stop(self, piece: str) -> tuple[_StopString, int] | None:
        """The stop string completed first in `piece`, and the position in `piece` just after it."""
        may_stop = self.num_tokens >= self._min_tokens
        for position, character in enumerate(piece, start=1):
            complete = [stop for stop in self._stops if stop.advance(character)]
            if complete and may_stop:
                return max(complete, key=lambda stop: len(stop.text)), position
        return None


class _StopString:
    """One stop string as a Knuth-Morris-Pratt automaton: `matched` leading characters of it end the text so far."""

    def __init__(self, text: str) -> None:
        if not text:
            raise BadRequest("stop holds an empty string; leave it out or give at least one character", "stop")
        self.text = text
        self.matched = 0
        self._borders = _borders(text)

    def advance(self, character: str) -> bool:
        """Read one character; True when the whole string has just been read."""
        matched = self.matched
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        if self.text[matched] == character:
            matched += 1
        if matched < len(self.text):
            self.matched = matched
            return False
        self.matched = self._borders[-1]
        return True


def _borders(text: str) -> list[int]:
    """For each prefix of `text`: the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for position in range(1, len(text)):
        while length and text[position] != text[length]:
            length = borders[length - 1]
        if text[position] == text[length]:
            length += 1
        borders[position] = length
    return borders
