"""What all commands share: a parser that speaks our way, option types, and the options that several commands have."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable
from typing import Any, NoReturn

from .errors import USAGE, print_error

DEFAULT_URL = "http://127.0.0.1:8000"
Run = Callable[[argparse.Namespace], int]
Commands = Any  # argparse keeps the type of `add_subparsers` private


class Parser(argparse.ArgumentParser):
    """Errors as `penstock: error:` with a hint. No abbreviated options: a new option must not break a script."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        print_error(message, _suggestion(message) or f"see `{self.prog} --help`")
        raise SystemExit(USAGE)


def _suggestion(message: str) -> str:
    """'did you mean' for argparse's `invalid choice: 'x' (choose from …)`."""
    found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if found is None:
        return ""
    close = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1)
    return f"did you mean `{close[0]}`?" if close else ""


def add_command(commands: Commands, name: str, run: Run, purpose: str, details: str, example: str) -> Parser:
    """A sub-command: `purpose` is its line in the list, `details` follow it in its own help, `example` ends that."""
    description = f"{purpose}\n\n{details}" if details else purpose
    parser: Parser = commands.add_parser(name, help=purpose, description=description, epilog=f"example:\n  {example}")
    parser.set_defaults(run=run)
    return parser


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An option type: an integer in [low, high]."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """An option type: a float in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, got {text!r}")
        return value

    return parse


def numbers(low: int, high: int) -> Callable[[str], list[int]]:
    """Parses whole numbers from `low` to `high`, separated by commas."""
    one = whole_number(low, high)
    return lambda text: [one(part) for part in text.split(",")]


def add_server_options(parser: Parser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help=f"address of a running cluster (default: {DEFAULT_URL})")
    parser.add_argument("--api-key", metavar="KEY", help="API key (default: $PENSTOCK_API_KEY; none when unset)")


def add_model_options(parser: Parser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="number format of weights and KV cache (default: auto, bfloat16 where this machine computes it natively)",
    )
    parser.add_argument(
        "--quantization",
        choices=("auto", "none", "int8"),
        help="how weights are multiplied: none, in that number format; int8, in 8 bits (or as stored where a GGUF file "
        "has 4 or 8); auto, as they are stored, where native kernels can (default: auto)",
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        help="least level logged to stderr (default: info)",
    )
