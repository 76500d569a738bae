"""When requests are sent: seconds from the start of the run, computed before it, so that a slow server delays nobody.

A closed loop has no schedule: so many requests are always under way, which hides how long others would have waited
(coordinated omission). It measures capacity, not latency under load.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .names import Shape


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A schedule's law. `rate` and `end_rate` in requests per second; `burstiness` is the gamma shape: 1 is Poisson,
    less is burstier (the gaps' coefficient of variation is 1/√burstiness).
    """

    shape: Shape = "poisson"
    rate: float = 1.0
    burstiness: float = 1.0
    end_rate: float = 0.0

    def times(self, count: int, seed: int) -> list[float]:
        """`count` non-decreasing times. True draws: they are not rescaled to end exactly at count / rate."""
        draw = np.random.default_rng([seed, 1])
        match self.shape:
            case "burst":
                return [0.0] * count
            case "constant":
                return [i / self.rate for i in range(count)]
            case "poisson":
                gaps = draw.exponential(1 / self.rate, count)
            case "gamma":
                gaps = draw.gamma(self.burstiness, 1 / (self.rate * self.burstiness), count)
            case "linear-ramp" | "exponential-ramp":
                gaps = draw.exponential(1.0, count) / np.array(self._ramp(count))
        return [float(t) for t in np.cumsum(gaps)]

    def _ramp(self, count: int) -> list[float]:
        """The rate before each request, from `rate` to `end_rate`."""
        steps = [i / max(1, count - 1) for i in range(count)]
        if self.shape == "linear-ramp":
            return [self.rate + (self.end_rate - self.rate) * step for step in steps]
        return [self.rate * (self.end_rate / self.rate) ** step for step in steps]


def replay(times: Sequence[float], speed: float) -> list[float]:
    """A trace's times from 0, `speed` times as fast; sorted, since some logs are not."""
    ordered = sorted(times)
    return [(t - ordered[0]) / speed for t in ordered]


def spread(times: Sequence[float]) -> list[float]:
    """Equal times laid out evenly up to the next one: logs that are written every few seconds are no bursts.

    The last group takes as long as the median step.
    """
    distinct = sorted(set(times))
    if len(distinct) < 2:
        return list(times)
    steps = [b - a for a, b in itertools.pairwise(distinct)]
    end = {start: start + step for start, step in zip(distinct, [*steps, sorted(steps)[len(steps) // 2]], strict=True)}
    size: dict[float, int] = {}
    for t in times:
        size[t] = size.get(t, 0) + 1
    seen: dict[float, int] = {}
    spread_out = []
    for t in times:
        place = seen.get(t, 0)
        seen[t] = place + 1
        spread_out.append(t + (end[t] - t) * place / size[t])
    return spread_out
