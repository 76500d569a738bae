"""Help, usage errors and the version: at once, without the heavy libraries, and in our words."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import pytest

import penstock
from penstock.cli.main import build_parser, main
from penstock.core.config import DEFAULT_MODEL
from penstock.models import store

COMMANDS = [
    "serve",
    "chat",
    "generate",
    "models",
    "models list",
    "models pull",
    "models path",
    "status",
    "top",
    "explain",
    "role",
    "restart",
    "doctor",
    "train-draft",
    "router",
]
COMMANDS += ["gateway", "prefill", "decode", "bench serve"]
HEAVY = {"torch", "aiohttp", "zmq", "msgspec", "numpy", "tokenizers", "rich", "yaml", "asyncio", "urllib.request"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_complete_and_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom penstock.cli.main import main\n"
        f"try:\n    main({[*command.split(), '--help']!r})\n"
        f"except SystemExit as end:\n    assert end.code == 0\nprint('HEAVY', *sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1].split() == ["HEAVY"]
    assert re.search(r"^examples?:\n  penstock|^examples?:\n  ls", done.stdout, re.MULTILINE)
    assert done.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_with_a_value_says_its_default_or_is_required(command: str) -> None:
    for action in _parser_of(command)._actions:
        if (
            action.option_strings
            and action.nargs != 0
            and not action.required
            and "--topology" not in action.option_strings
        ):
            assert action.help is not None
            assert "(default: " in action.help, action.option_strings


def _parser_of(command: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = build_parser()
    for word in command.split():
        parser = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[word]
    return parser


def test_version_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"penstock {penstock.__version__}\n"


def test_no_command_shows_the_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "commands:" in captured.err


@pytest.mark.parametrize(
    ("argv", "error", "hint"),
    [
        (["serv"], "invalid choice: 'serv'", "did you mean `serve`?"),
        (
            ["serve", "--port", "99999"],
            "argument --port: must be a whole number from 0 to 65535, got '99999'",
            "see `penstock serve",
        ),
        (["serve", "--dtype", "float23"], "invalid choice: 'float23'", "did you mean `float32`?"),
        (["serve", "--decode", "0"], "must be a whole number from 1 to 64, got '0'", "see `penstock serve --help`"),
        (["chat", "--temperature", "nan"], "must be a number from 0 to 2, got 'nan'", "see `penstock chat --help`"),
        (["status", "--ur", "x"], "unrecognized arguments: --ur x", "see `penstock --help`"),
        (["prefill"], "the following arguments are required: --topology", "see `penstock prefill --help`"),
    ],
)
def test_usage_error_is_one_line_with_a_hint(
    argv: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert captured.out == ""
    assert first.startswith("penstock: error: ")
    assert error in first
    assert second.startswith(f"hint: {hint}")


def test_unknown_model_is_a_configuration_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "path", "smollm2-135m-instuct"]) == 2
    assert "did you mean smollm2-135m-instruct?" in capsys.readouterr().err


def test_default_model_is_the_stores_default() -> None:
    assert store.DEFAULT_MODEL == DEFAULT_MODEL
