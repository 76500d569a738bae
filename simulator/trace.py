"""Request traces as data: when a request comes, how long it is, and which prefix it shares.

Formats: Mooncake (JSON lines with `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of chained 512-token
blocks) and Azure (CSV with TIMESTAMP, ContextTokens, GeneratedTokens; it tells nothing about prefixes). Either may be
gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import count
from pathlib import Path

import msgspec

from ..core.errors import ConfigError

BLOCK_TOKENS = 512  # of one hash id
MAX_REQUESTS = 10_000_000
_FILL = [7] * (BLOCK_TOKENS - 1)


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """Two requests whose `prefix_ids` begin alike share so many leading blocks of BLOCK_TOKENS tokens."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    prefix_ids: tuple[int, ...]
    class_name: str = ""  # as in the router's GenerateRequest
    tenant: str = ""

    def prompt_ids(self) -> list[int]:
        """Token ids with the same sharing: a block is named by its first token."""
        ids: list[int] = []
        for prefix_id in self.prefix_ids:
            ids.append(prefix_id)
            ids += _FILL
        return ids[: self.num_prompt_tokens]


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def load_trace(path: Path) -> list[TraceRequest]:
    """The requests in order of arrival, the first at 0. Raises ConfigError that names the line it cannot read."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path}: cannot be read: {error}") from error
    rows = _mooncake(text, path) if text.lstrip()[:1] == "{" else _azure(text, path)
    requests = sorted(rows, key=lambda request: request.arrival_s)
    if not requests:
        raise ConfigError(f"trace {path}: no requests; give a Mooncake JSON-lines or an Azure CSV file")
    return _spread([replace(request, arrival_s=request.arrival_s - requests[0].arrival_s) for request in requests])


def shape_trace(requests: list[TraceRequest], rate: float, limit: int | None) -> list[TraceRequest]:
    """The first `limit` requests, coming `rate` times as fast."""
    return [replace(request, arrival_s=request.arrival_s / rate) for request in requests[:limit]]


def _mooncake(text: str, path: Path) -> Iterator[TraceRequest]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"trace {path}, line {number}: {error}") from error
        needed = -(-row.input_length // BLOCK_TOKENS)
        if row.input_length < 1 or row.output_length < 1 or len(row.hash_ids) < needed:
            raise ConfigError(
                f"trace {path}, line {number}: input_length {row.input_length}, output_length {row.output_length}, "
                f"{len(row.hash_ids)} hash_ids; lengths must be above 0 and need {needed} hash_ids"
            )
        yield TraceRequest(row.timestamp / 1e3, row.input_length, row.output_length, tuple(row.hash_ids[:needed]))


def _azure(text: str, path: Path) -> Iterator[TraceRequest]:
    unique = count()
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        try:
            # Seven digits of the second are written; datetime reads six.
            arrival_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"trace {path}, line {number}: {error!r}; expected {_AZURE_HEADER}") from error
        if prompt < 1 or output < 1:
            continue  # nothing to prefill, or nothing to answer
        ids = tuple(next(unique) for _ in range(-(-prompt // BLOCK_TOKENS)))
        yield TraceRequest(arrival_s, prompt, output, ids)


_AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def _spread(requests: list[TraceRequest]) -> list[TraceRequest]:
    """Requests with one timestamp, evenly over the time until the next: the clock that wrote them was coarse."""
    spread: list[TraceRequest] = []
    first = 0
    while first < len(requests):
        last = first
        while last < len(requests) and requests[last].arrival_s == requests[first].arrival_s:
            last += 1
        start = requests[first].arrival_s
        gap = requests[last].arrival_s - start if last < len(requests) else 0.0
        spread += [
            replace(request, arrival_s=start + gap * place / (last - first))
            for place, request in enumerate(requests[first:last])
        ]
        first = last
    return spread
