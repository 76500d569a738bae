"""Workloads of real text: files of prompts, of conversations, of documents with questions."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import msgspec
import numpy as np

from ..core.errors import ConfigError
from .files import json_document, json_rows, lines
from .plan import Conversation, Part, Turn, clip_parts, part_tokens


class PromptRow(msgspec.Struct, frozen=True):
    """One line of a JSONL file: `prompt`, `question`, or `turns` (user messages) or `messages`; the rest may lack."""

    prompt: str | None = None
    question: str | None = None
    turns: tuple[str, ...] = ()
    messages: tuple[PromptMessage, ...] = ()
    category: str = ""
    output_tokens: int | None = None
    output_len: int | None = None
    max_tokens: int | None = None


class PromptMessage(msgspec.Struct, frozen=True):
    role: str
    content: str


class DocumentQuery(msgspec.Struct, frozen=True):
    query: str


class DocumentRow(msgspec.Struct, frozen=True):
    """A long text and the questions asked about it."""

    document: str
    queries: tuple[DocumentQuery | str, ...]
    domain: str = ""


class SharedMessage(msgspec.Struct, frozen=True):
    """ShareGPT's names: `from` is human, gpt, system, …"""

    value: str
    speaker: str = msgspec.field(name="from", default="")


class SharedConversation(msgspec.Struct, frozen=True):
    conversations: tuple[SharedMessage, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """How a file of text is used: the answer's length where the file does not say, and whether later turns are sent."""

    num_output_tokens: int = 128
    has_turns: bool = True


def jsonl(path: Path, asked: Asked) -> list[Conversation]:
    """One row a line; also Spec-Bench, MT-bench (`turns`), GSM8K (`question`), HumanEval and Arena-Hard (`prompt`)."""
    return [_row(path, i, row, asked) for i, row in enumerate(json_rows(path, PromptRow), 1)]


def _row(path: Path, number: int, row: PromptRow, asked: Asked) -> Conversation:
    said = list(row.turns) or [m.content for m in row.messages if m.role == "user"]
    said = said or [text for text in (row.prompt, row.question) if text][:1]
    if not said:
        raise ConfigError(f"{path}, row {number}: none of `prompt`, `question`, `turns`, `messages` holds a prompt")
    num_output = row.output_tokens or row.output_len or row.max_tokens or asked.num_output_tokens
    if not 1 <= num_output < 1 << 24:
        raise ConfigError(f"{path}, row {number}: an answer of {num_output} tokens is not possible")
    said = said if asked.has_turns else said[:1]
    return Conversation(tuple(Turn((text,), num_output) for text in said), category=row.category)


def sharegpt(path: Path, asked: Asked) -> list[Conversation]:
    """ShareGPT: the human's messages are sent, each answer is as long as the recorded one (by the estimate of plan.py).

    A JSON list or JSON lines. Conversations that do not begin with a human are cut to where one speaks.
    """
    is_list = next(lines(path), (0, ""))[1].lstrip().startswith("[")
    rows = json_document(path, list[SharedConversation]) if is_list else list(json_rows(path, SharedConversation))
    found = [Conversation(turns) for row in rows if (turns := _shared_turns(row, asked))]
    if not found:
        raise ConfigError(f"{path}: no conversation with a human message and an answer")
    return found


def _shared_turns(row: SharedConversation, asked: Asked) -> tuple[Turn, ...]:
    said = row.conversations
    turns = [
        Turn((user.value,), max(1, int(len(answer.value) / 4)))
        for user, answer in itertools.pairwise(said)
        if user.speaker in ("human", "user") and answer.speaker in ("gpt", "assistant", "chatgpt") and user.value
    ]
    return tuple(turns if asked.has_turns else turns[:1])


def documents(path: Path, asked: Asked, max_prompt_tokens: int | None) -> list[Conversation]:
    """JSON lines of `document` and `queries`: one request for each query, the document before it.

    A document is cut so that it fits with the longest query: all of them have the same head, for a prefix cache.
    """
    found = []
    for row in json_rows(path, DocumentRow):
        asked_about = [one if isinstance(one, str) else one.query for one in row.queries]
        longest = max((part_tokens(query) for query in asked_about), default=0)
        text: tuple[Part, ...] = (row.document,)
        if max_prompt_tokens is not None:
            text = clip_parts(text, max(2, max_prompt_tokens - longest - 16))
        questions = [f"\n\nQuestion: {query}\nAnswer:" for query in asked_about]
        turns = [Turn((*text, question), asked.num_output_tokens) for question in questions]
        found += [Conversation((turn,), category=row.domain) for turn in turns]
    return found


def shuffled(conversations: list[Conversation], seed: int) -> list[Conversation]:
    """The same in an order drawn from `seed`."""
    order = np.random.default_rng([seed, 5]).permutation(len(conversations))
    return [conversations[int(i)] for i in order]
