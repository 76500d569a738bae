"""A generated load that shifts: first long prompts with short answers, then short prompts with long answers.

No ratio of prefill to decode workers suits both halves. Every prompt is a new one; arrivals are Poisson.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from .trace import BLOCK_TOKENS, TraceRequest

NAME = "shift"  # what stands for it where a trace is named


@dataclass(frozen=True, slots=True)
class Half:
    """Lengths are drawn evenly from the ranges, in tokens."""

    duration_s: float
    requests_per_s: float
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]


PREFILL_HEAVY = Half(300.0, 5.0, (4_000, 12_000), (20, 100))
DECODE_HEAVY = Half(300.0, 20.0, (200, 1_000), (600, 1_400))


def shifting_trace(seed: int, halves: tuple[Half, ...] = (PREFILL_HEAVY, DECODE_HEAVY)) -> list[TraceRequest]:
    """The halves one after the other, in order of arrival; the same for the same seed."""
    rng, blocks = random.Random(f"shift {seed}"), count()
    requests: list[TraceRequest] = []
    start_s = 0.0
    for half in halves:
        requests += _requests(half, start_s, rng, blocks)
        start_s += half.duration_s
    return requests


def _requests(half: Half, start_s: float, rng: random.Random, blocks: count[int]) -> Iterator[TraceRequest]:
    now = start_s + rng.expovariate(half.requests_per_s)
    while now < start_s + half.duration_s:
        prompt = rng.randint(*half.prompt_tokens)
        ids = tuple(next(blocks) for _ in range(-(-prompt // BLOCK_TOKENS)))
        yield TraceRequest(now, prompt, rng.randint(*half.output_tokens), ids)
        now += rng.expovariate(half.requests_per_s)
