"""What /explain answers, as msgspec structs. Times in milliseconds, shares and utilisations from 0 to 1."""

from __future__ import annotations

import msgspec

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Quantiles(msgspec.Struct, frozen=True):
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    mean: float = 0.0


class PartRow(msgspec.Struct, frozen=True):
    """One part of a latency. Each column of a table adds up to the latency's own."""

    name: str
    ms: Quantiles
    share: Quantiles


class Latency(msgspec.Struct, frozen=True):
    count: int
    ms: Quantiles
    parts: list[PartRow]


class WorkerUse(msgspec.Struct, frozen=True):
    """One worker over the window. None: it has not been seen long enough, or tells nothing of it."""

    worker_id: str
    role: str
    state: str
    utilisation: float | None = None  # share of the time within steps
    running: float = 0.0  # mean
    waiting: float = 0.0  # mean
    max_waiting: int = 0
    kv_used: float = 0.0  # largest share of its blocks in use
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    step_ms: float | None = None  # mean


class Pipe(msgspec.Struct, frozen=True):
    """The hand-offs of the window."""

    handoffs: int = 0
    bytes: int = 0
    bytes_per_s: float | None = None  # while one is on its way


class Bottleneck(msgspec.Struct, frozen=True):
    name: str
    sentence: str
    evidence: list[str]


class Change(msgspec.Struct, frozen=True):
    """What the replayed window says of another cluster; shares of what it says of this one, -0.38 is 38 % less."""

    change: str
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot: float | None = None


class WhatIf(msgspec.Struct, frozen=True):
    """`error`: the replay's p90 TTFT of the window as it was, against the measured one. Empty `why_not`: it fits."""

    why_not: str
    changes: list[Change]
    error: float | None = None


class Explanation(msgspec.Struct, frozen=True):
    window_s: float
    requests: int
    requests_per_s: float
    failed: int
    queued: float  # mean number of requests in the router's queue
    max_queued: int
    ttft: Latency
    itl: Latency
    workers: list[WorkerUse]
    pipe: Pipe
    bottleneck: Bottleneck
    stream_bottleneck: Bottleneck
    what_if: WhatIf


class RequestReport(msgspec.Struct, frozen=True):
    """One request. The `ttft` parts add up to `ttft_ms`, the `itl` parts to the time of all its gaps together."""

    request_id: str
    label: str
    age_s: float
    decode: str
    prefill: str | None
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    attempts: int
    resumed: int
    transferred_bytes: int
    ttft_ms: float
    e2e_ms: float
    ttft: dict[str, float]
    itl: dict[str, float]
    error: str = ""
