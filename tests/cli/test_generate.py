"""`penstock generate` and `penstock models`, with a stand-in for the model."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from penstock.cli import model_files
from penstock.cli.main import main
from penstock.cli.model_files import progress_bar
from penstock.cli.models import format_models
from penstock.models import tokenizer as tokenizer_module
from penstock.models.store import ModelEntry, ModelPath


class Letters:
    """A tokenizer with one token a byte."""

    chat_template = "{{ messages }}"
    special_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return list(f"<{messages[0]['content']}>".encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


class Echo:
    """A runner that says the prompt again."""

    made: ClassVar[list[tuple[Any, ...]]] = []
    asked: ClassVar[list[Any]] = []

    @classmethod
    def open(cls, *settings: Any) -> Echo:
        cls.made.append(settings)
        return cls()

    def stream(self, prompt_ids: list[int], params: Any) -> Iterator[SimpleNamespace]:
        self.asked.append(params)
        for token_id in prompt_ids[: params.max_tokens]:
            yield SimpleNamespace(tokens=(SimpleNamespace(token_id=token_id),))


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> type[Echo]:
    monkeypatch.setattr(Echo, "made", [])
    monkeypatch.setattr(Echo, "asked", [])
    monkeypatch.setitem(sys.modules, "penstock.decode_node.local", SimpleNamespace(LocalRunner=Echo))
    monkeypatch.setattr(model_files, "local_model", lambda source: ModelPath("tiny", Path("/tiny.gguf")))
    monkeypatch.setattr(tokenizer_module, "load_tokenizer", lambda path: Letters())
    monkeypatch.setattr("penstock.core.logging.setup_logging", lambda *_: None)
    return Echo


def test_prompt_goes_through_the_chat_template(echo: type[Echo], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "häy", "--threads", "2"]) == 0
    assert capsys.readouterr().out == "<häy>\n"
    assert echo.made == [(Path("/tiny.gguf"), "tiny", "auto", 2, "auto", "auto")]
    assert (echo.asked[0].temperature, echo.asked[0].max_tokens) == (0.0, 256)


def test_raw_prompt_from_stdin_is_continued_as_it_stands(
    echo: type[Echo], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\x1bdef"))
    argv = ["generate", "-", "--raw", "--max-tokens", "5", "--temperature", "0.5", "--seed", "7"]
    assert main(argv) == 0
    assert capsys.readouterr().out == "abcd\n"
    assert (echo.asked[0].temperature, echo.asked[0].seed) == (0.5, 7)


def test_method_of_speculation_is_checked_and_its_path_made_absolute(
    echo: type[Echo], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a", "--speculative", "eagel"]) != 0
    assert "speculation.method: 'eagel' is not one of off, auto, ngram" in capsys.readouterr().err
    assert main(["generate", "a", "--speculative", "eagle:head.safetensors"]) != 0
    assert f"there is no draft head at {tmp_path}/head.safetensors" in capsys.readouterr().err
    (tmp_path / "head.safetensors").touch()
    assert main(["generate", "a", "--speculative", "eagle:head.safetensors"]) == 0
    assert [made[-1] for made in echo.made] == [f"eagle:{tmp_path}/head.safetensors"]


def test_empty_prompt_is_a_usage_error(echo: type[Echo], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", ""]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_models_are_listed_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    entry = ModelEntry("tiny", "pypi:x==1", 3 << 20, "MIT", None)
    assert format_models([entry]).splitlines()[1] == "tiny   3.0 MiB  MIT      pypi:x==1  not fetched yet"
    assert main(["models"]) == 0
    assert capsys.readouterr().out.startswith("MODEL")
    assert main(["models", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["name"] == "smollm2-135m-instruct"


def test_path_of_a_local_file_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    for verb in ("path", "pull"):
        assert main(["models", verb, str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n{file}\n"


def test_progress_without_a_terminal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("fetching tiny") as report:
        report(0, 5_000_000)
        report(5_000_000, 5_000_000)
    assert capsys.readouterr() == ("", "fetching tiny (5 MB)\n")
