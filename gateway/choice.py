"""One choice of an answer: token events in, text with logprobs out. Pure; it ends exactly once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..core.errors import InternalError
from ..models.text_stream import TextStream
from ..protocol.messages import FinishReason
from ..protocol.sampling import SamplingParams
from ..router.interface import TokensEvent
from .requests import AnswerOptions
from .tokens import GatewayTokenizer, TokenEntry, token_entry


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one event adds to a choice. `index` runs over prompts x n."""

    index: int
    text: str
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_tokens: int = 0  # of the choice, so far


class Choice:
    """Text, logprobs and end of one choice.

    An entry of the logprobs leaves with the first character of its token, so a token whose text is held back (it may
    become part of a stop string) is held back too, and one that only belongs to a stop string never leaves.
    """

    def __init__(self, index: int, tokenizer: GatewayTokenizer, params: SamplingParams, options: AnswerOptions) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._has_logprobs = options.top_logprobs is not None
        self._shown_stop_ids = frozenset(params.stop_token_ids) if options.includes_stop else frozenset()
        self._stream = TextStream(
            tokenizer,
            options.stop,
            include_stop=options.includes_stop,
            skip_special_tokens=options.skips_special_tokens,
            min_tokens=params.min_tokens,
        )
        self._num_received = 0
        self._num_chars = 0  # sent
        self._held: deque[TokenEntry] = deque()

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Tokens that count: up to and including the one that completed a stop string."""
        return self._stream.num_tokens

    @property
    def was_stopped_here(self) -> bool:
        """A stop string ended the choice, so the engine does not know yet."""
        return self._stream.stopped is not None

    def take(self, event: TokensEvent) -> ChoiceDelta | None:
        """Add an event; None when it adds nothing to see. Events after the end are ignored."""
        if self.is_finished:
            return None
        if event.index != self._num_received:
            raise InternalError(f"choice {self.index}: token {event.index} came, {self._num_received} was next")
        self._num_received += len(event.tokens)
        delta = self._stream.feed([token.token_id for token in event.tokens])
        text = delta.text
        if self._has_logprobs:
            offsets = delta.token_offsets
            self._held.extend(
                token_entry(self._tokenizer, event.tokens[i], offset) for i, (_, offset) in enumerate(offsets)
            )
        if delta.stopped is not None:
            self.finish_reason = "stop"
        elif event.finish_reason is not None:
            text += self._end(event)
        self._num_chars += len(text)
        entries = self._release()
        if not text and not entries and not self.is_finished:
            return None
        return ChoiceDelta(self.index, text, entries, self.finish_reason, self.num_tokens)

    def _end(self, event: TokensEvent) -> str:
        """Finish as the engine says; the text that was still held."""
        text = self._stream.finish().text
        self.finish_reason = event.finish_reason
        if event.stop_token is not None and event.stop_token in self._shown_stop_ids:
            text += self._tokenizer.token_bytes(event.stop_token).decode(errors="replace")
        return text

    def _release(self) -> list[TokenEntry]:
        released: list[TokenEntry] = []
        keep_all = self.is_finished and not self.was_stopped_here
        while self._held and (keep_all or self._held[0].offset < self._num_chars):
            released.append(self._held.popleft())
        return released
