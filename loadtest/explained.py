"""What a Penstock server says of a run: where the time of its requests went, what held them up, what would help.

Other servers have no such answer, and then the run has none.
"""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec

from .client import Client

LEAST_S, MOST_S = 1.0, 300.0  # of the window that GET /explain takes
MAX_BYTES = 1 << 20


class Quantiles(msgspec.Struct, frozen=True):
    """Milliseconds, or shares."""

    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    mean: float = 0.0


class Part(msgspec.Struct, frozen=True):
    name: str
    ms: Quantiles = Quantiles()
    share: Quantiles = Quantiles()


class Latency(msgspec.Struct, frozen=True):
    count: int = 0
    ms: Quantiles = Quantiles()
    parts: tuple[Part, ...] = ()


class Bottleneck(msgspec.Struct, frozen=True):
    name: str
    sentence: str = ""
    evidence: tuple[str, ...] = ()


class Change(msgspec.Struct, frozen=True):
    """Shares: -0.38 is 38 % less."""

    change: str
    ttft_p90: float = 0.0
    tpot: float | None = None


class WhatIf(msgspec.Struct, frozen=True):
    why_not: str = ""
    changes: tuple[Change, ...] = ()


class Explained(msgspec.Struct, frozen=True):
    """The part of the server's answer that a report shows."""

    window_s: float
    ttft: Latency
    itl: Latency
    bottleneck: Bottleneck
    stream_bottleneck: Bottleneck
    what_if: WhatIf = WhatIf()


async def ask_why(client: Client, duration_s: float) -> Explained | None:
    """The server's account of the last `duration_s` seconds; None where it has none to give."""
    window_s = min(MOST_S, max(LEAST_S, duration_s))
    try:
        async with (
            asyncio.timeout(10),
            client.http.get(f"{client.url}/explain", params={"window_s": f"{window_s:.1f}"}) as response,
        ):
            if response.status != 200:
                return None
            raw = await response.content.read(MAX_BYTES)
            while len(raw) < MAX_BYTES and (more := await response.content.read(MAX_BYTES)):
                raw += more
        return msgspec.json.decode(raw, type=Explained)
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError):
        return None
