"""Rows of data files, gzipped or not. What is wrong is said with the file's name and the line."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, TypeVar

import msgspec

from ..core.errors import ConfigError

T = TypeVar("T")


def open_text(path: Path) -> TextIO:
    """The file's text; raises ConfigError when there is no such file."""
    try:
        with path.open("rb") as head:
            is_zipped = head.read(2) == b"\x1f\x8b"
        if is_zipped:
            return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as err:
        raise ConfigError(f"{path}: {err.strerror}; give the path of a data file") from err


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not blank."""
    with open_text(path) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
        except (UnicodeDecodeError, EOFError, OSError, zlib.error) as err:
            raise ConfigError(f"{path}: cannot be read as text: {err}") from err


def json_rows(path: Path, row_type: type[T]) -> Iterator[T]:
    """Each line decoded as `row_type`; raises ConfigError that names line and field."""
    decoder = msgspec.json.Decoder(row_type)
    for number, line in lines(path):
        try:
            yield decoder.decode(line)
        except msgspec.MsgspecError as err:
            raise ConfigError(f"{path}, line {number}: {err}") from err


def json_document(path: Path, document_type: type[T]) -> T:
    """The whole file as one JSON document."""
    with open_text(path) as stream:
        try:
            return msgspec.json.decode(stream.read(), type=document_type)
        except (msgspec.MsgspecError, UnicodeDecodeError, EOFError, OSError, zlib.error) as err:
            raise ConfigError(f"{path}: {err}") from err


def csv_rows(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) with the given columns, by our names: {ours: the file's}. Raises ConfigError when one is missing."""
    numbered = lines(path)
    try:
        _, first = next(numbered)
    except StopIteration as err:
        raise ConfigError(f"{path}: the file is empty") from err
    header = next(csv.reader([first]))
    missing = [name for name in columns.values() if name not in header]
    if missing:
        raise ConfigError(f"{path}: no column {missing[0]!r} among {', '.join(header)}")
    places = {ours: header.index(name) for ours, name in columns.items()}
    for number, line in numbered:
        cells = next(csv.reader([line]))
        if len(cells) < len(header):
            raise ConfigError(f"{path}, line {number}: {len(cells)} columns where the header has {len(header)}")
        yield number, {ours: cells[place] for ours, place in places.items()}
