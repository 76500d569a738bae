"""Quantiles by nearest rank: each is a value that occurred."""

from __future__ import annotations

import math
from collections.abc import Sequence


def place_of(count: int, q: float) -> int:
    """Place, from 0, of the q-quantile among `count` sorted values."""
    return min(count - 1, max(0, math.ceil(q * count) - 1))


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least the share `q` of the values do not exceed; 0 for no values."""
    return sorted(values)[place_of(len(values), q)] if values else 0.0
