"""What the requests around a quantile are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...core.quantiles import place_of
from .parts import Microseconds

BAND = 0.025  # of all requests, on either side of a quantile


def shares_around(parts: Sequence[Microseconds], q: float) -> tuple[float, ...]:
    """How the q-quantile of the sums divides among the parts: by the mean of the requests around it. Adds up to 1."""
    ordered = sorted(parts, key=sum)
    middle, reach = place_of(len(ordered), q), math.floor(BAND * len(ordered))
    band = ordered[max(0, middle - reach) : middle + reach + 1]
    sums = [sum(column) for column in zip(*band, strict=True)]
    total = sum(sums)
    return tuple(value / total for value in sums) if total else tuple(0.0 for _ in sums)
