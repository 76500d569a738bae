"""Typed reads from an untrusted mapping: each failure is a ModelFileError with the file, the field and the value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..core.errors import ModelFileError

_SHOWN_CHARACTERS = 80


def shown(value: object) -> str:
    """`value` for an error message, shortened so that a hostile file cannot flood the log."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >> 128:
        return "a number of more than 128 bits"
    if isinstance(value, list | tuple | dict) and len(value) > 16:
        return f"a {type(value).__name__} of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def printable(name: str) -> str:
    """A name from the file for an error message: as it is where that is safe to print, else escaped and cut."""
    return name if len(name) <= _SHOWN_CHARACTERS and name.isprintable() else shown(name)


class Fields:
    """One mapping and where it came from. A default of None means that the field is required; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values = values
        self.source = source
        self.prefix = prefix

    def error(self, key: str, problem: str) -> ModelFileError:
        value = self.values.get(self.prefix + key)
        return ModelFileError(f"{self.source}: {self.prefix}{key} is {shown(value)}, {problem}")

    def get(self, key: str) -> Any:
        return self.values.get(self.prefix + key)

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 31) -> int:
        value = default if self.get(key) is None else self.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"expected a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(key, "expected a finite number above 0")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, bool):
            raise self.error(key, "expected true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, str):
            raise self.error(key, "expected a string")
        return value

    def sequence(self, key: str, length: int) -> list[Any] | None:
        """A list of `length` or more entries, cut to `length`; None when absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) < length:
            raise self.error(key, f"expected a list of {length} entries")
        return list(value[:length])

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """Exactly `length` finite numbers above zero."""
        values = self.get(key)
        if not isinstance(values, list | tuple) or len(values) != length:
            raise self.error(key, f"expected {length} numbers")
        if not all(type(v) in (int, float) and math.isfinite(v) and v > 0 for v in values):
            raise self.error(key, f"expected {length} finite numbers above 0")
        return tuple(float(v) for v in values)

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of them, in order, without repeats; empty when absent or -1. Ids beyond the vocabulary are
        left out: no model can produce them.
        """
        value = self.get(key)
        if value is None or value == -1:
            return ()
        ids = list(value) if isinstance(value, list | tuple) else [value]
        if len(ids) > 1024 or not all(type(i) is int and i >= 0 for i in ids):
            raise self.error(key, "expected a token id or a list of them")
        return tuple(dict.fromkeys(i for i in ids if i < vocab_size))

    def group(self, key: str) -> Fields | None:
        """A nested mapping; None when absent or empty."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "expected an object")
        return Fields(value, f"{self.source}: {self.prefix}{key}") if value else None
