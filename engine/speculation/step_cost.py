"""What a decode step takes by the number of its tokens, measured when the engine starts and corrected while it runs.

    seconds = scale · shape[tokens] · curve[tokens]  +  attention, which grows with what the sequences have cached

Only ratios matter to the control, so what slows all steps alike (other processes, longer batches) is one scale, and a
point's own shape, which moves the decision, learns slowly and is forgotten again.
"""

from __future__ import annotations

from bisect import bisect_left

from ..interface import StepCosts

_SCALE_RATE, _SHAPE_RATE, _FORGET = 0.1, 0.05, 0.002
_FARTHEST = 2.0  # a shape stays within a factor of so much


class StepCost:
    """`costs`: as the engine measured them."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._tokens = [tokens for tokens, _ in costs.curve]
        self._seconds = [seconds for _, seconds in costs.curve]
        self._shape = [1.0] * len(self._tokens)
        self.scale = 1.0  # how much longer steps take than when they were measured

    def seconds(self, num_tokens: int, num_cached: int, num_further: int) -> float:
        """Of a step of `num_tokens`, whose sequences have `num_cached` tokens in the cache together; those behind the
        first of each sequence look at `num_further` of them, together.
        """
        attention = self._costs.context_s * num_cached + self._costs.query_s * num_further
        return self.scale * (self._at(num_tokens) + attention)

    def note(self, num_tokens: int, num_cached: int, num_further: int, seconds: float) -> None:
        """Such a step has taken so long."""
        ratio = min(max(seconds / self.seconds(num_tokens, num_cached, num_further), 0.25), 4.0)
        self.scale *= ratio**_SCALE_RATE
        self._shape = [1 + (shape - 1) * (1 - _FORGET) for shape in self._shape]
        nearest = min(range(len(self._tokens)), key=lambda i: abs(self._tokens[i] - num_tokens))
        shape = self._shape[nearest] * ratio**_SHAPE_RATE
        self._shape[nearest] = min(max(shape, 1 / _FARTHEST), _FARTHEST)

    def _at(self, num_tokens: int) -> float:
        """Between two points in a straight line, beyond the last one in proportion."""
        place = bisect_left(self._tokens, num_tokens)
        if place == len(self._tokens):
            return self._point(-1) * num_tokens / self._tokens[-1]
        if place == 0 or self._tokens[place] == num_tokens:
            return self._point(place)
        low, high = self._tokens[place - 1], self._tokens[place]
        share = (num_tokens - low) / (high - low)
        return self._point(place - 1) * (1 - share) + self._point(place) * share

    def _point(self, place: int) -> float:
        return self._seconds[place] * self._shape[place]
