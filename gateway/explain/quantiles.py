"""Quantiles by nearest rank, and what the requests around one are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .parts import Microseconds

BAND = 0.025  # of all requests, on either side of a quantile


def place_of(count: int, q: float) -> int:
    """Place, from 0, of the q-quantile among `count` sorted values."""
    return min(count - 1, max(0, math.ceil(q * count) - 1))


def quantile(values: Sequence[float], q: float) -> float:
    """0 for no values."""
    return sorted(values)[place_of(len(values), q)] if values else 0.0


def shares_around(parts: Sequence[Microseconds], q: float) -> tuple[float, ...]:
    """How the q-quantile of the sums divides among the parts: by the mean of the requests around it. Adds up to 1."""
    ordered = sorted(parts, key=sum)
    middle, reach = place_of(len(ordered), q), math.floor(BAND * len(ordered))
    band = ordered[max(0, middle - reach) : middle + reach + 1]
    sums = [sum(column) for column in zip(*band, strict=True)]
    total = sum(sums)
    return tuple(value / total for value in sums) if total else tuple(0.0 for _ in sums)
