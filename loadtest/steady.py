"""Which part of a run was steady, and whether the system kept up at all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .record import Record
from .statistics import slope_t

STEADY_SHARE = 0.8  # of the peak of concurrency: below it the run fills up or drains
MIN_FOR_TREND = 30
CLEAR_T = 4.0  # a trend counts when its t value is above; by chance that is one run in ten thousand
LEAST_GROWTH = 0.5  # and when it changes the quantity over the run by this share of its mean


@dataclass(frozen=True, slots=True)
class Span:
    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


def concurrency(records: Sequence[Record]) -> list[tuple[float, int]]:
    """(time, requests under way from then on), from intended time to last byte."""
    changes = [(record.asked.intended_s, 1) for record in records] + [(record.end_s, -1) for record in records]
    steps: list[tuple[float, int]] = []
    level = 0
    for at_s, change in sorted(changes):
        level += change
        if steps and steps[-1][0] == at_s:
            steps[-1] = (at_s, level)
        else:
            steps.append((at_s, level))
    return steps


def steady_span(records: Sequence[Record]) -> Span | None:
    """From the first to the last moment at which concurrency was at 0.8 of its peak or above; None without requests.

    The peak is the level that is exceeded for a twentieth of the run: one burst does not set it.
    """
    steps = concurrency(records)
    if len(steps) < 2:
        return None
    held = [(level, end - start) for (start, level), (end, _) in itertools.pairwise(steps)]
    threshold = STEADY_SHARE * _usual_peak(held)
    reached = [i for i, (level, _) in enumerate(held) if level >= threshold]
    if not reached:
        return None
    return Span(steps[reached[0]][0], steps[reached[-1] + 1][0])


def _usual_peak(held: list[tuple[int, float]]) -> int:
    total = sum(length for _, length in held)
    left = total / 20
    for level, length in sorted(held, reverse=True):
        left -= length
        if left <= 0:
            return level
    return max(level for level, _ in held)


def is_saturated(records: Sequence[Record]) -> bool:
    """True when requests under way and TTFT both grow through the run: a queue that diverges has no percentiles.

    Of completed requests in the order of their intended times; meaningful for open-loop arrivals at a constant rate.
    """
    done = sorted((r for r in records if r.ttft_s is not None), key=lambda r: r.asked.intended_s)
    if len(done) < MIN_FOR_TREND:
        return False
    times = [record.asked.intended_s for record in done]
    levels = _levels_at(times, concurrency(records))
    return _grows(times, levels) and _grows(times, [record.ttft_s or 0.0 for record in done])


def _levels_at(times: list[float], steps: list[tuple[float, int]]) -> list[float]:
    levels: list[float] = []
    place = -1
    for at_s in times:
        while place + 1 < len(steps) and steps[place + 1][0] <= at_s:
            place += 1
        levels.append(float(steps[place][1]) if place >= 0 else 0.0)
    return levels


def _grows(times: list[float], values: list[float]) -> bool:
    slope, t = slope_t(times, values)
    mean = sum(values) / len(values)
    return t > CLEAR_T and mean > 0 and slope * (times[-1] - times[0]) > LEAST_GROWTH * mean
