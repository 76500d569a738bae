"""Fitting a line while it is used: recursive least squares that forgets, for durations of a few known causes.

Every observation is weighed by the size of what it predicts, so a prompt of twenty seconds counts as much as one of
twenty milliseconds. What lies far outside the usual error moves the line only as far as an error at the edge would, and
the edge itself widens, so a lasting change is followed and a hiccup is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EDGE = 3.0  # usual errors beyond which an observation is cut
START_ERROR = 1.0  # relative; so wide that the first observations are taken as they are
ERROR_DECAY = 0.05
LEAST_ERROR = 0.02
ONE_SIDED = 0.85  # of the usual error: a mean error beyond it says that the line itself is off
HASTE = 1.15  # by which the spread grows with each observation then


class Regression:
    """seconds ≈ Σ coefficient · cause, with coefficients that never fall below 0.

    `prior` are the coefficients before anything is seen; `trust` is how many times its own prior each may plausibly be
    off (1.0: the prior may well be wrong by its whole size). `floor_s`: below it errors count as absolute.
    """

    def __init__(
        self, prior: Sequence[float], *, trust: float = 4.0, memory: float = 400.0, floor_s: float = 0.001
    ) -> None:
        self.coefficients = list(prior)
        self.num_observed = 0
        self.num_refused = 0
        self._keep = 1.0 - 1.0 / memory
        self._floor_s = floor_s
        self._error = START_ERROR
        self._drift = 0.0
        self._bound = [(trust * max(value, 1e-12)) ** 2 for value in prior]
        size = len(self._bound)
        self._spread = [[self._bound[i] if i == j else 0.0 for j in range(size)] for i in range(size)]

    @property
    def error(self) -> float:
        """Usual size of the relative error."""
        return self._error

    def predict(self, causes: Sequence[float]) -> float:
        """Seconds; never negative."""
        return sum(c * x for c, x in zip(self.coefficients, causes, strict=True))

    def observe(self, causes: Sequence[float], seconds: float) -> bool:
        """Learn from one measurement. False, and no change, for what cannot be one."""
        if not (math.isfinite(seconds) and seconds >= 0 and all(math.isfinite(x) and x >= 0 for x in causes)):
            self.num_refused += 1
            return False
        predicted = self.predict(causes)
        scale = 1.0 / max(predicted, self._floor_s)
        error = (seconds - predicted) * scale
        edge = EDGE * self._error
        self._error += ERROR_DECAY * (min(abs(error), 2 * edge) - self._error)
        self._error = max(self._error, LEAST_ERROR)
        self._drift += ERROR_DECAY * (max(-edge, min(edge, error)) - self._drift)
        self._move([x * scale for x in causes], max(-edge, min(edge, error)))
        self.num_observed += 1
        return True

    def _move(self, causes: list[float], error: float) -> None:
        spread, size = self._spread, len(causes)
        toward = [sum(row[j] * causes[j] for j in range(size)) for row in spread]
        noise = self._error * self._error
        total = noise + sum(causes[i] * toward[i] for i in range(size))
        for i in range(size):
            gain = toward[i] / total
            self.coefficients[i] = max(0.0, self.coefficients[i] + gain * error)
            for j in range(size):
                spread[i][j] -= gain * toward[j]
        self._forget()

    def _forget(self) -> None:
        """Old observations fade, and faster while all errors lie on one side. Each coefficient is widened by itself, at
        most to what it was at the start: one that nothing speaks of keeps no other from being learned anew.
        """
        spread, size = self._spread, len(self._bound)
        is_off = abs(self._drift) > ONE_SIDED * self._error and self._error > 2 * LEAST_ERROR
        growth = HASTE if is_off else 1.0 / self._keep
        for i in range(size):
            spread[i][i] = max(spread[i][i], 1e-6 * self._bound[i])
        wider = [math.sqrt(min(growth, max(1.0, self._bound[i] / spread[i][i]))) for i in range(size)]
        for i in range(size):
            for j in range(size):
                spread[i][j] *= wider[i] * wider[j]
