"""Several servers side by side, in rounds: which differences are larger than what one server does to itself. Pure.

In each round every server runs the same lengths and arrivals; the first runs twice (A/A), and its own differences are
the noise. The order turns by one place each round, so that no server always runs first.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "within noise"]


@dataclass(frozen=True, slots=True)
class Leg:
    """One run of a round. The base is server 0; `is_again` marks its second run."""

    server: int
    is_again: bool = False


def order(num_servers: int, round_number: int) -> list[Leg]:
    """The runs of a round, the base twice with the others between where there are any."""
    legs = [Leg(server) for server in range(num_servers)]
    legs.append(Leg(0, is_again=True))
    turn = round_number % len(legs)
    return legs[turn:] + legs[:turn]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure of a server over the base's, median and extremes of the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of one server. `noise` are the base's own ratios, second run over first."""

    figure: str
    server: int
    ratio: Ratio
    noise: Ratio
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Rounds:
    """Values of one figure, one of each round: of the base's two runs and of another server."""

    base: Sequence[float]
    again: Sequence[float]
    other: Sequence[float]


def compare(figure: str, server: int, rounds: Rounds, is_less_better: bool) -> Compared | None:
    """None where a value is missing (0).

    A difference counts when the whole range of ratios to the base (the geometric mean of its two runs) lies outside the
    noise band, which is widened to reach as far on both sides.
    """
    base, again, other = rounds.base, rounds.again, rounds.other
    if not base or any(value <= 0 for value in (*base, *again, *other)):
        return None
    noise = _ratio([b / a for a, b in zip(base, again, strict=True)])
    middle = [(a * b) ** 0.5 for a, b in zip(base, again, strict=True)]
    ratio = _ratio([o / m for o, m in zip(other, middle, strict=True)])
    band = max(noise.high, 1 / noise.low)
    verdict: Verdict = "within noise"
    if ratio.low > band:
        verdict = "worse" if is_less_better else "better"
    elif ratio.high < 1 / band:
        verdict = "better" if is_less_better else "worse"
    return Compared(figure, server, ratio, noise, verdict)


def _ratio(values: Sequence[float]) -> Ratio:
    return Ratio(statistics.median(values), min(values), max(values))
