"""The highest rate at which enough requests keep their targets: up by doubling, then halving the gap. Pure.

1. Probe `start`; while it is met, double; while none is met, halve. 2. Bisect between the highest met and the lowest
missed rate until they are within `precision`. 3. Confirm the answer by a second probe: a rate counts by all its probes
together. Missing at a rate means missing above it: where probes say otherwise, the lower miss stands (and is reported).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Probe:
    """One run at one rate. `is_valid` False: the client did not keep the rate, so nothing was learned of the server."""

    rate: float
    good: int
    sent: int
    is_saturated: bool = False
    is_valid: bool = True

    @property
    def attainment(self) -> float:
        return self.good / self.sent if self.sent else 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests per second; `precision` as a ratio: 1.05 ends within 5 %."""

    start: float = 1.0
    lowest: float = 0.01
    highest: float = 10_000.0
    precision: float = 1.05
    max_probes: int = 16
    num_confirmations: int = 1


@dataclass(slots=True)
class RateSearch:
    """Ask `next_rate`, run it, `add` the probe; None: the search is over, `best` is the answer."""

    share: float
    limits: Limits
    probes: list[Probe] = field(default_factory=list)
    num_own: int = 0

    def next_rate(self) -> float | None:
        if self.num_own >= self.limits.max_probes:
            return None
        met, missed = self.bracket()
        if met is None and missed is None:
            return self.limits.start
        if met is None:
            assert missed is not None
            lower = missed / 2
            return lower if lower >= self.limits.lowest else None
        if missed is None:
            return min(met * 2, self.limits.highest) if met < self.limits.highest else self._confirm(met)
        if missed / met > self.limits.precision:
            return math.sqrt(met * missed)
        return self._confirm(met)

    def add(self, probe: Probe) -> None:
        self.probes.append(probe)
        self.num_own += 1

    @property
    def best(self) -> float:
        """The highest rate that is met, 0 when none is."""
        return self.bracket()[0] or 0.0

    @property
    def is_client_bound(self) -> bool:
        """True when the rate above the answer failed for the client's sake: the server may be able to do more."""
        missed = self.bracket()[1]
        return missed is not None and all(not probe.is_valid for probe in self.probes if probe.rate == missed)

    def bracket(self) -> tuple[float | None, float | None]:
        """(highest met below the lowest missed, lowest missed)."""
        rates = sorted({probe.rate for probe in self.probes})
        missed = next((rate for rate in rates if not self.is_met(rate)), None)
        met = [rate for rate in rates if missed is None or rate < missed]
        return (met[-1] if met else None), missed

    def is_met(self, rate: float) -> bool:
        """By all probes at the rate together; a diverging queue meets nothing, however short the probe."""
        valid = [probe for probe in self.probes if probe.rate == rate and probe.is_valid]
        good, sent = sum(probe.good for probe in valid), sum(probe.sent for probe in valid)
        is_diverging = 2 * sum(probe.is_saturated for probe in valid) > len(valid)
        return bool(sent) and good >= self.share * sent and not is_diverging

    def _confirm(self, rate: float) -> float | None:
        asked = sum(probe.rate == rate for probe in self.probes)
        return rate if asked <= self.limits.num_confirmations else None


class ShareSearch:
    """The highest rate of one server for each of several shares, the strictest first; later ones know all probes of
    those before. `done` are the searches that are over.
    """

    def __init__(self, shares: Sequence[float], limits: Limits) -> None:
        self._left = sorted(shares)
        self._limits = limits
        self._current: RateSearch | None = None
        self.done: list[RateSearch] = []

    def next_rate(self) -> float | None:
        """See `RateSearch`."""
        while self._current is not None or self._left:
            if self._current is None:
                known = list(self.done[-1].probes) if self.done else []
                self._current = RateSearch(self._left.pop(), self._limits, known)
            rate = self._current.next_rate()
            if rate is not None:
                return rate
            self.done.append(self._current)
            self._current = None
        return None

    def add(self, probe: Probe) -> None:
        assert self._current is not None, "a probe follows a rate that was asked for"
        self._current.add(probe)
