"""A mapping from a file → frozen dataclasses, strictly: every key known, every value of its type and within its bounds.

The dataclass is the schema: its annotations are the types, `setting(default, low, high)` adds bounds, a nested
dataclass is a section.
Errors name the path of the value, the value, what was expected, and for an unknown key the nearest known one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError

T = TypeVar("T")


def setting(default: Any, low: float, high: float) -> Any:
    """A dataclass field whose number must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


def build(cls: type[T], data: object, path: str = "") -> T:
    """An instance of dataclass `cls` from `data`; raises ConfigError that names the path."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]  # T is a dataclass by contract
    mapping = _section(data, path, known)
    hints = get_type_hints(cls)
    values = {key: _value(hints[key], value, _join(path, key), known[key].metadata) for key, value in mapping.items()}
    missing = [
        name
        for name, f in known.items()
        if name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{_join(path, missing[0])}: missing")
    return cls(**values)


def to_mapping(value: object) -> Any:
    """The inverse of `build`, in plain types that YAML can hold."""
    if is_dataclass(value):
        return {f.name: to_mapping(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def nearest(word: str, known: list[str]) -> str:
    """', did you mean "x"?' for the closest known word, else the list of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f', did you mean "{close[0]}"?' if close else f"; known: {', '.join(known)}"


def _section(data: object, path: str, known: Mapping[str, object]) -> Mapping[str, object]:
    if data is None:  # a section with nothing in it
        return {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or 'topology'}: must be a mapping, got {data!r}")
    for key in data:
        if key not in known:
            raise ConfigError(f"{_join(path, str(key))}: unknown key{nearest(str(key), list(known))}")
    return data


def _value(hint: Any, value: object, path: str, bounds: Mapping[str, Any]) -> Any:
    if is_dataclass(hint):
        return build(hint, value, path)  # type: ignore[arg-type]  # a dataclass type, not an instance
    origin = get_origin(hint)
    if origin is Literal:
        return _choice(get_args(hint), value, path)
    if origin in (UnionType, Union):  # the second for a Literal or None
        hint, optional = next(arg for arg in get_args(hint) if arg is not NoneType), value is None
        return None if optional else _value(hint, value, path, bounds)
    if origin is tuple:
        return _strings(value, path)
    return _scalar(hint, value, path, bounds)


def _choice(choices: tuple[object, ...], value: object, path: str) -> object:
    if value in choices and not isinstance(value, bool):
        return value
    words = [str(choice) for choice in choices]
    raise ConfigError(f"{path}: {value!r} is not one of {', '.join(words)}")


def _strings(value: object, path: str) -> tuple[str, ...]:
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    raise ConfigError(f"{path}: must be a list of non-empty strings")  # the value may be a secret: not shown


def _scalar(kind: type, value: object, path: str, bounds: Mapping[str, Any]) -> object:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{path}: must be {_KINDS[kind]}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: must be a finite number, got {value!r}")
    if bounds and isinstance(value, (int, float)) and not bounds["low"] <= value <= bounds["high"]:
        raise ConfigError(f"{path}: must be between {bounds['low']:g} and {bounds['high']:g}, got {value!r}")
    return value


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
