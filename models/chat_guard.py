"""Tell the special tokens that a chat template wrote from the same characters typed by a client.

The template is rendered again with one character of each special token hidden, behind a stand-in of the same length,
in everything the client sent. A special token that still appears was written by the template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from .chat_messages import Message

_STAND_INS = range(0xF0000, 0xFFFFE)  # private use: no script and no Unicode normal form touches these


class SpecialTokens:
    """The special tokens of one model, as they look in text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._marks = sorted({_mark_of(token) for token in longest_first})

    def found_in(self, text: str) -> list[str]:
        return self._pattern.findall(text)

    def hide_in(self, text: str, table: Mapping[int, str]) -> str:
        """Apply `table` to the special tokens in `text` only."""
        return self._pattern.sub(lambda match: match[0].translate(table), text)

    def cut(self, text: str) -> Iterable[tuple[str, bool]]:
        """Cut `text` at its special tokens into (piece, is_special)."""
        end = 0
        for match in self._pattern.finditer(text):
            if match.start() > end:
                yield text[end : match.start()], False
            yield match[0], True
            end = match.end()
        if end < len(text):
            yield text[end:], False

    def guard(self, client: Message, text: str) -> Guard | None:
        """A guard for what `client` sent, or None when no part of a special token can come from there.

        `text` is the prompt made of it.
        """
        strings = list(_strings(client))
        there = [mark for mark in self._marks if any(mark in string for string in strings)]
        if not there:
            return None
        table = dict(zip(map(ord, there), _unused_characters(len(there), [*strings, text]), strict=True))
        return Guard(self, table, is_needed=any(self._pattern.search(string) for string in strings))


class Guard:
    """Hides characters in one client's strings. `is_needed`: the client typed at least one whole special token."""

    def __init__(self, special: SpecialTokens, table: Mapping[int, str], *, is_needed: bool) -> None:
        self.is_needed = is_needed
        self._special = special
        self._table = table
        self._back = {ord(stand_in): chr(mark) for mark, stand_in in table.items()}

    def hide_all(self, client: Message) -> Message:
        """Hide every character that could be part of a special token: nothing gets through."""
        return {key: _change(value, lambda text: text.translate(self._table)) for key, value in client.items()}

    def hide_tokens(self, client: Message) -> Message:
        """Hide only within whole special tokens."""
        return {
            key: _change(value, lambda text: self._special.hide_in(text, self._table)) for key, value in client.items()
        }

    def reveal(self, text: str) -> str:
        return text.translate(self._back)


def _mark_of(token: str) -> str:
    """The character to hide: best a sign, so that names and roles keep their meaning."""
    signs = (character for character in token if not character.isalnum() and character != "_")
    capitals = (character for character in token if not character.islower())
    return next(signs, next(capitals, token[0]))


def _unused_characters(count: int, texts: Sequence[str]) -> list[str]:
    used: set[str] = set().union(*texts)
    free = (chr(code) for code in _STAND_INS if chr(code) not in used)
    return [next(free) for _ in range(count)]


def _strings(value: object) -> Iterable[str]:
    """Every string in `value`, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _change(value: object, change: Callable[[str], str]) -> object:
    """Apply `change` to every string in `value`, and to keys that no template can ask for by name."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key if key.isidentifier() else change(key): _change(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_change(item, change) for item in value]
    return value
