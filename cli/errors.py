"""How a command fails: one `penstock: error:` line, one `hint:` line with the next step, and an exit code."""

from __future__ import annotations

import sys

FAILURE = 1
USAGE = 2
INTERRUPTED = 130


class CliError(Exception):
    """A failure with its next step. `exit_code` is 2 when the command line or a file it names is wrong."""

    def __init__(self, message: str, hint: str = "", exit_code: int = FAILURE) -> None:
        super().__init__(message)
        self.hint, self.exit_code = hint, exit_code


def print_error(message: str, hint: str = "") -> None:
    print(f"penstock: error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
