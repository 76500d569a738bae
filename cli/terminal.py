"""Plain text for terminals: columns, sizes, and colour only where it is wanted."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TextIO

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def has_colour(stream: TextIO) -> bool:
    """A terminal that shows colour, and a person who has not asked for none (NO_COLOR, see no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def style(text: str, name: str, is_coloured: bool) -> str:
    return f"\x1b[{_STYLES[name]}m{text}\x1b[0m" if is_coloured else text


def printable(text: str) -> str:
    """`text` without the control characters that would move the cursor or change the terminal."""
    return _CONTROL.sub("", text)


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Rows in aligned columns, two spaces apart; columns in `right` are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def byte_size(count: float) -> str:
    """`count` bytes in the largest binary unit that leaves at least one: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
