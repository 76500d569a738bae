"""The JSON of answers and chunks, as OpenAI shapes it. One shape for each of the two generation endpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from ..protocol.messages import FinishReason
from .choice import ChoiceDelta
from .generation import Usage
from .requests import AnswerOptions
from .tokens import TokenEntry

Json = dict[str, object]


@dataclass(slots=True)
class FinishedChoice:
    """All deltas of one choice, joined."""

    index: int
    texts: list[str] = field(default_factory=list)
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: ChoiceDelta) -> None:
        self.texts.append(delta.text)
        self.entries += delta.entries
        self.finish_reason = delta.finish_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Shape(Protocol):
    """How one endpoint says things."""

    def opening(self, index: int) -> Json | None:
        """The chunk before the first of a choice, if the endpoint has one."""
        ...

    def chunk(self, delta: ChoiceDelta) -> Json: ...

    def choiceless_chunk(self) -> Json: ...

    def body(self, choices: list[FinishedChoice]) -> Json: ...


def with_usage(document: Json, usage: Usage | None, report: Json | None = None) -> bytes:
    """The document as bytes, with its `usage` (null: not yet) and our own part."""
    document["usage"] = None if usage is None else usage.body()
    if report is not None:
        document["penstock"] = report
    return msgspec.json.encode(document)


class CompletionShape:
    """/v1/completions: chunks and answer have the same shape."""

    def __init__(self, answer_id: str, created: int, options: AnswerOptions) -> None:
        self._head: Json = {"id": answer_id, "object": "text_completion", "created": created, "model": options.model}
        self._options = options

    def opening(self, index: int) -> Json | None:
        return None

    def chunk(self, delta: ChoiceDelta) -> Json:
        return self._head | {"choices": [self._choice(delta.index, delta.text, delta.entries, delta.finish_reason)]}

    def choiceless_chunk(self) -> Json:
        return self._head | {"choices": []}

    def body(self, choices: list[FinishedChoice]) -> Json:
        return self._head | {"choices": [self._choice(c.index, c.text, c.entries, c.finish_reason) for c in choices]}

    def _choice(self, index: int, text: str, entries: list[TokenEntry], finish_reason: str | None) -> Json:
        logprobs = (
            None if self._options.top_logprobs is None else _completion_logprobs(entries, self._options.top_logprobs)
        )
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, answer_id: str, created: int, options: AnswerOptions) -> None:
        self._rest: Json = {"created": created, "model": options.model}
        self._chunk_head: Json = {"id": answer_id, "object": "chat.completion.chunk"} | self._rest
        self._body_head: Json = {"id": answer_id, "object": "chat.completion"} | self._rest
        self._top = options.top_logprobs

    def opening(self, index: int) -> Json | None:
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, delta: ChoiceDelta) -> Json:
        said: Json = {"content": delta.text} if delta.text or delta.finish_reason is None else {}
        logprobs = None if self._top is None else _chat_logprobs(delta.entries, self._top)
        return self._chunk(delta.index, said, logprobs, delta.finish_reason)

    def choiceless_chunk(self) -> Json:
        return self._chunk_head | {"choices": []}

    def body(self, choices: list[FinishedChoice]) -> Json:
        return self._body_head | {"choices": [self._choice(choice) for choice in choices]}

    def _chunk(self, index: int, said: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        choice: Json = {"index": index, "delta": said, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._chunk_head | {"choices": [choice]}

    def _choice(self, choice: FinishedChoice) -> Json:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None if self._top is None else _chat_logprobs(choice.entries, self._top),
            "finish_reason": choice.finish_reason,
        }


def _completion_logprobs(entries: list[TokenEntry], num_top: int) -> Json:
    """The chosen token is always among the alternatives, so there may be one more than asked for."""
    return {
        "tokens": [entry.chosen.token for entry in entries],
        "token_logprobs": [entry.chosen.logprob for entry in entries],
        "top_logprobs": [
            {chance.token: chance.logprob for chance in entry.top[:num_top]}
            | {entry.chosen.token: entry.chosen.logprob}
            for entry in entries
        ],
        "text_offset": [entry.offset for entry in entries],
    }


def _chat_logprobs(entries: list[TokenEntry], num_top: int) -> Json:
    content = [
        {
            "token": entry.chosen.token,
            "logprob": entry.chosen.logprob,
            "bytes": entry.chosen.bytes,
            "top_logprobs": entry.top[:num_top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}
