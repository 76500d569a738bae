"""Request bodies: what a turn of a conversation looks like on the two generation endpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from .plan import Conversation, Turn
from .rendering import Renderer

Endpoint = Literal["chat", "completions"]
PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class RequestForm:
    """How requests are put: endpoint, prompts as ids or text, and the fields that all of them carry."""

    model: str
    endpoint: Endpoint = "completions"
    is_ids: bool = True
    is_exact_length: bool = True
    has_chunk_usage: bool = True
    temperature: float | None = 0.0
    extra: dict[str, object] | None = None


class Dialogue:
    """One conversation while it is sent: what was said so far, and the body of the next request."""

    def __init__(self, conversation: Conversation, form: RequestForm, renderer: Renderer) -> None:
        self._form, self._renderer = form, renderer
        self._messages: list[Message] = []
        for user, assistant in conversation.history:
            self._say("user", renderer.text([user], not self._messages))
            self._say("assistant", renderer.text([assistant], False))

    def body(self, turn: Turn) -> bytes:
        form = self._form
        document: dict[str, object] = {"model": form.model, "stream": True, "max_tokens": turn.num_output_tokens}
        if form.endpoint == "chat":
            self._say("user", self._renderer.text(turn.parts, not self._messages))
            document["messages"] = self._messages
        elif form.is_ids:
            document["prompt"] = self._renderer.ids(turn.parts)
        else:
            document["prompt"] = self._renderer.text(turn.parts)
        document["stream_options"] = {"include_usage": True} | (
            {"continuous_usage_stats": True} if form.has_chunk_usage else {}
        )
        if form.temperature is not None:
            document["temperature"] = form.temperature
        if form.is_exact_length:
            document["ignore_eos"] = True
        return msgspec.json.encode(document | (form.extra or {}))

    def answered(self, text: str) -> None:
        """The server's answer to the last body; the next turn goes on behind it."""
        self._say("assistant", text)

    def _say(self, role: str, content: str) -> None:
        self._messages.append({"role": role, "content": content})
