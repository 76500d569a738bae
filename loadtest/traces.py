"""Request traces: arrival times and lengths, no text. The formats are those of the public data sets of these names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import msgspec

from ..core.errors import ConfigError
from .arrivals import spread
from .files import csv_rows, json_rows
from .plan import Conversation, Filling, Part, Turn, clip_parts
from .workloads import TRACE_BLOCK, TRACE_PROMPT

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Scale:
    """`length` multiplies all token counts, so that a trace of long prompts fits a small model."""

    length: float = 1.0

    def tokens(self, count: int) -> int:
        return max(1, round(count * self.length))


def azure(path: Path, seed: int, scale: Scale) -> list[Conversation]:
    """Azure's LLM inference traces of 2023 and after: TIMESTAMP, ContextTokens, GeneratedTokens."""
    columns = {"at": "TIMESTAMP", "prompt": "ContextTokens", "output": "GeneratedTokens"}
    rows = ((_date_s(path, n, row["at"]), row, n) for n, row in csv_rows(path, columns))
    return _by_time(_plain(path, seed, scale, rows))


def burstgpt(path: Path, seed: int, scale: Scale) -> list[Conversation]:
    """BurstGPT: Timestamp in seconds, Request tokens, Response tokens. Rows without an answer failed: left out."""
    columns = {"at": "Timestamp", "prompt": "Request tokens", "output": "Response tokens"}
    rows = ((_number(path, n, row["at"]), row, n) for n, row in csv_rows(path, columns))
    return _by_time(one for one in _plain(path, seed, scale, rows, is_skipping_empty=True))


def length_pairs(path: Path, seed: int, scale: Scale) -> list[Conversation]:
    """Lengths without times: num_prefill_tokens, num_decode_tokens."""
    columns = {"prompt": "num_prefill_tokens", "output": "num_decode_tokens"}
    return list(_plain(path, seed, scale, ((None, row, n) for n, row in csv_rows(path, columns))))


class MooncakeRow(msgspec.Struct, frozen=True):
    """Milliseconds, tokens, and the ids of chained blocks of 512 prompt tokens; an equal id is an equal prefix."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def mooncake(path: Path, seed: int, scale: Scale, is_spreading: bool = True) -> list[Conversation]:
    """Mooncake's traces. A block id becomes the same random tokens wherever it stands, so prefixes are shared as
    recorded; with a length scale the blocks shrink too. Equal times are spread up to the next:
    the log is written in batches.
    """
    rows = list(json_rows(path, MooncakeRow))
    times = [row.timestamp / 1e3 for row in rows]
    block_tokens = scale.tokens(MOONCAKE_BLOCK_TOKENS)
    found = []
    for i, (row, at_s) in enumerate(zip(rows, spread(times) if is_spreading else times, strict=True)):
        if row.input_length < 0 or row.output_length < 0 or min(row.hash_ids, default=0) < 0:
            raise ConfigError(f"{path}, row {i + 1}: a length or a hash id is negative")
        blocks: list[Part] = [Filling((TRACE_BLOCK, seed, block), block_tokens) for block in row.hash_ids]
        num_prompt = scale.tokens(row.input_length)
        rest = num_prompt - block_tokens * len(blocks)
        if rest > 0:
            blocks.append(Filling((TRACE_PROMPT, seed, i), rest))
        turn = Turn(clip_parts(blocks, num_prompt), scale.tokens(row.output_length))
        found.append(Conversation((turn,), at_s=at_s))
    return _by_time(found)


def _plain(
    path: Path,
    seed: int,
    scale: Scale,
    rows: Iterator[tuple[float | None, dict[str, str], int]],
    is_skipping_empty: bool = False,
) -> Iterator[Conversation]:
    for i, (at_s, row, number) in enumerate(rows):
        prompt, output = (_count(path, number, row[name]) for name in ("prompt", "output"))
        if is_skipping_empty and output == 0:
            continue
        part = Filling((TRACE_PROMPT, seed, i), scale.tokens(prompt))
        yield Conversation((Turn((part,), scale.tokens(output)),), at_s=at_s)


def _by_time(conversations: Iterator[Conversation] | list[Conversation]) -> list[Conversation]:
    """Sorted, the first at 0."""
    ordered = sorted(conversations, key=lambda one: one.at_s or 0.0)
    start = ordered[0].at_s or 0.0 if ordered else 0.0
    return [replace(one, at_s=(one.at_s or 0.0) - start) for one in ordered]


def _count(path: Path, number: int, text: str) -> int:
    value = _number(path, number, text)
    if not 0 <= value < 1 << 40:
        raise ConfigError(f"{path}, line {number}: {text!r} is not a number of tokens")
    return int(value)


def _number(path: Path, number: int, text: str) -> float:
    try:
        return float(text)
    except ValueError as err:
        raise ConfigError(f"{path}, line {number}: {text!r} is not a number") from err


def _date_s(path: Path, number: int, text: str) -> float:
    """Seconds of a time such as 2023-11-16 18:15:46.6805900 or with a zone; more than six digits are rounded down."""
    whole, _, rest = text.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    zone = rest[len(digits) :]
    try:
        day = datetime.fromisoformat(whole + zone)
    except ValueError as err:
        raise ConfigError(f"{path}, line {number}: {text!r} is not a time") from err
    since = day - datetime(1970, 1, 1, tzinfo=day.tzinfo)
    return since.total_seconds() + (float(f"0.{digits}") if digits else 0.0)
