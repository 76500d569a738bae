"""Files of prompts: the kinds of line, doubles, and errors that name the line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError
from penstock.models.tokenizer import load_tokenizer
from penstock.training.prompts import encode_chats, read_chats


def test_all_kinds_of_lines_are_read_in_order_and_once(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_text('{"prompt": "one"}\n\n{"question": "two"}\n{"prompt": "one"}\n')
    lines = '{"turns": ["three", "left out"]}\n{"messages": [{"role": "system", "content": "four"}]}\n'
    packed.write_bytes(gzip.compress(lines.encode()))
    chats = list(read_chats([plain, packed]))
    assert [chat[0]["content"] for chat in chats] == ["one", "two", "three", "four"]
    assert [chat[0]["role"] for chat in chats] == ["user", "user", "user", "system"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", r"p.jsonl:2: not valid JSON"),
        ("[1]", r"p.jsonl:2: expected a JSON object"),
        ('{"text": "x"}', r"p.jsonl:2: none of messages, prompt, question, turns is in this object"),
        ('{"prompt": 5}', r"p.jsonl:2: prompt: expected messages with a role and a content, both text"),
        ('{"messages": []}', r"p.jsonl:2: expected a list of messages"),
        ('{"messages": [{"role": "user"}]}', r"p.jsonl:2: expected messages with a role"),
    ],
)
def test_line_at_fault_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=problem):
        list(read_chats([path]))


@pytest.mark.parametrize("content", [b"\xff\xfe", b""])
def test_unreadable_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.jsonl.gz"
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"p.jsonl.gz: cannot be read"):
        list(read_chats([path]))


def test_long_prompts_are_left_out(tiny_folder: Path) -> None:
    chats: list[list[dict[str, object]]] = [
        [{"role": "user", "content": " ".join(["w5"] * length)}] for length in (1, 4, 5)
    ]
    assert encode_chats(chats, load_tokenizer(tiny_folder), 4) == [[5], [5, 5, 5, 5]]
