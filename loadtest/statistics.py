"""Percentiles, intervals and trends of measured numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MIN_FOR_P99 = 1000  # with fewer samples the 99th percentile is one of the ten largest, which the next run changes
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of `num` values; all zero when there are none."""

    num: int
    mean: float
    std: float
    least: float
    greatest: float
    percentiles: dict[int, float]

    @property
    def median(self) -> float:
        return self.percentiles[50]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Between the two nearest of sorted values, linearly; 0 of none."""
    if not ordered:
        return 0.0
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(values: Sequence[float]) -> Distribution:
    """Mean, population standard deviation, extremes and percentiles."""
    ordered = sorted(values)
    if not ordered:
        return Distribution(0, 0.0, 0.0, 0.0, 0.0, dict.fromkeys(PERCENTILES, 0.0))
    mean = math.fsum(ordered) / len(ordered)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered))
    return Distribution(
        len(ordered), mean, std, ordered[0], ordered[-1], {p: percentile(ordered, p) for p in PERCENTILES}
    )


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share (Wilson's score, 95 %); (0, 1) of nothing."""
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    scale = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def slope_t(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of ys over xs and its t value; (0, 0) with fewer than three points or equal xs."""
    n = len(xs)
    if n < 3:
        return 0.0, 0.0
    mean_x, mean_y = math.fsum(xs) / n, math.fsum(ys) / n
    var_x = math.fsum((x - mean_x) ** 2 for x in xs)
    if var_x == 0:
        return 0.0, 0.0
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / var_x
    rest = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    error = math.sqrt(rest / (n - 2) / var_x)
    if error == 0:
        return slope, math.copysign(math.inf, slope) if slope else 0.0
    return slope, slope / error
