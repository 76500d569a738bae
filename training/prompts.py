"""Prompts out of JSON-lines files, as token ids of one model.

A line is an object with `messages` (a chat), or with a single user message under `prompt`, `question` or `turns` (a
list, of which the first counts). Files that end in .gz are compressed.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import BadRequest, ConfigError

if TYPE_CHECKING:
    from ..models.tokenizer import Tokenizer

Message = dict[str, object]

_MAX_LINE_CHARACTERS = 1 << 22
_TEXT_FIELDS = ("prompt", "question", "turns")


def read_chats(paths: Iterable[Path]) -> Iterator[list[Message]]:
    """The chats of all files in order, doubles left out. Raises ConfigError naming the file and the line at fault."""
    seen: set[str] = set()
    for path in paths:
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            chat = _chat(line, f"{path.name}:{number}")
            key = json.dumps(chat, sort_keys=True)
            if key not in seen:
                seen.add(key)
                yield chat


def encode_chats(chats: Iterable[list[Message]], tokenizer: Tokenizer, max_tokens: int) -> list[list[int]]:
    """Token ids of each chat that has at most `max_tokens`; longer ones are left out.

    A model without a chat template gets the text of the last message. Raises ConfigError for a chat that the template
    refuses.
    """
    prompts = (_encode(chat, tokenizer) for chat in chats)
    return [prompt for prompt in prompts if 0 < len(prompt) <= max_tokens]


def _encode(chat: list[Message], tokenizer: Tokenizer) -> list[int]:
    try:
        if tokenizer.chat_template is None:
            return tokenizer.encode(str(chat[-1]["content"]))
        return tokenizer.encode_chat(chat)
    except BadRequest as error:
        raise ConfigError(f"the chat template refuses a prompt: {error}") from error


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            while line := file.readline(_MAX_LINE_CHARACTERS):
                yield line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _chat(line: str, source: str) -> list[Message]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{source}: expected a JSON object")
    if "messages" in row:
        return _messages(row["messages"], source)
    for field in _TEXT_FIELDS:
        if field in row:
            text = row[field][0] if isinstance(row[field], list) and row[field] else row[field]
            return _messages([{"role": "user", "content": text}], f"{source}: {field}")
    raise ConfigError(f"{source}: none of messages, {', '.join(_TEXT_FIELDS)} is in this object")


def _messages(value: Any, source: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{source}: expected a list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ConfigError(f"{source}: expected messages with a role and a content, both text")
    return value
