"""What things cost here, in seconds, fitted while the cluster runs from what the router sees anyway.

    prefill    n tokens to compute behind c cached ones, beside b running streams and w neighbours at work:
               a + b·n + c·n·(c + n/2) + d·n·b + e·n·w
    transfer   bytes of KV from one worker to another: a + b·bytes, times how this pair compares with the others
    token      time per output token with b streams that hold t tokens, and for each token p seconds with prompts on its
               worker and q with prompts on that one's neighbours: a + b·streams + c·t + d·p + e·q

Neighbours are a prefill and a decode worker on the same machine: where they share its cores, each slows the other.
Each worker has a factor: how much longer prefill takes there than the line says. All of it is pure and deterministic:
the same observations in the same order give the same predictions. Before the first observation the priors speak; they
say only that local work costs less than local work and a transfer.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from ..core.ids import WorkerKey
from .answer_lengths import AnswerLengths
from .regression import Regression

K = TypeVar("K", bound=Hashable)

PREFILL_PRIOR = (0.005, 1e-4, 1e-9, 1e-6, 1e-5)  # s, s/token, s/token², s/(token·stream), s/(token·worker)
TRANSFER_PRIOR = (0.001, 1e-9)  # s, s/byte
TOKEN_PRIOR = (0.01, 5e-4, 1e-7, 1.0, 0.1)  # s, s/stream, s/token held, s/s, s/s
FACTOR_WEIGHT = 0.1  # of each observation; more of the first ones, once the line itself can be relied on
SETTLED_ERROR = 0.3
FACTOR_BOUNDS = (0.2, 5.0)
MAX_FACTORS = 8192
OUTPUT_PRIOR = 128.0  # tokens
OUTPUT_WEIGHT = 0.02


class Factors(Generic[K]):
    """How one of many compares with the common line; 1 for what was never seen. Least recently learned ones go."""

    def __init__(self) -> None:
        self.values: OrderedDict[K, float] = OrderedDict()
        self.lowest = 1.0  # that any has been
        self._num_seen: dict[K, int] = {}

    def get(self, key: K) -> float:
        return self.values.get(key, 1.0)

    def learn(self, key: K, predicted: float, seen: float, *, is_settled: bool = False) -> None:
        """`predicted` is what the line alone says; where that `is_settled`, the first few count as a plain mean."""
        if not (predicted > 0 and seen > 0 and math.isfinite(seen / predicted)):
            return
        low, high = FACTOR_BOUNDS
        value, num_seen = self.get(key), self._num_seen.get(key, 0) + 1
        weight = max(FACTOR_WEIGHT, 1.0 / (num_seen + 1)) if is_settled else FACTOR_WEIGHT
        value += weight * (min(high, max(low, seen / predicted)) - value)
        self.values[key], self._num_seen[key] = value, num_seen
        self.lowest = min(self.lowest, value)
        self.values.move_to_end(key)
        if len(self.values) > MAX_FACTORS:
            del self._num_seen[self.values.popitem(last=False)[0]]


class CostModel:
    """Predictions in seconds; token counts and bytes as they are."""

    def __init__(self) -> None:
        self._prefill = Regression(PREFILL_PRIOR, trust=10.0)
        self._transfer = Regression(TRANSFER_PRIOR, trust=10.0)
        self._token = Regression(TOKEN_PRIOR, trust=4.0)
        self._speeds: Factors[WorkerKey] = Factors()
        self._pairs: Factors[tuple[WorkerKey, WorkerKey]] = Factors()
        self.expected_output_tokens = OUTPUT_PRIOR
        self.lengths = AnswerLengths()

    # ---- predictions, one by one and as coefficients for whoever needs many

    @property
    def prefill_line(self) -> list[float]:
        """a to e of the line, for a worker whose factor is 1."""
        return self._prefill.coefficients

    @property
    def speeds(self) -> Mapping[WorkerKey, float]:
        """How much longer prefill takes on a worker than the line says; 1 for those that are missing."""
        return self._speeds.values

    @property
    def token_line(self) -> list[float]:
        """a to e of the time per output token."""
        return self._token.coefficients

    def prefill_s(
        self, worker: WorkerKey, num_new: int, num_cached: int, num_streams: int = 0, num_beside: int = 0
    ) -> float:
        """To compute `num_new` tokens behind `num_cached` ones, while `num_streams` decode on the same worker and
        `num_beside` of its neighbours compute.
        """
        a, b, c, d, e = self._prefill.coefficients
        line = a + num_new * (b + c * (num_cached + 0.5 * num_new) + d * num_streams + e * num_beside)
        return line * self._speeds.get(worker)

    def least_prefill_s(self, num_new: int, num_cached: int) -> float:
        """No worker takes less for so many tokens, or for more new ones and fewer cached ones."""
        a, b, c, _, _ = self._prefill.coefficients
        return (a + num_new * (b + c * (num_cached + 0.5 * num_new))) * self._speeds.lowest

    def transfer_s(self, source: WorkerKey, target: WorkerKey, num_bytes: int) -> float:
        """From the end of prefill until decode has it all."""
        a, b = self._transfer.coefficients
        return (a + b * num_bytes) * self._pairs.get((source, target))

    def least_transfer_s(self, num_bytes: int) -> float:
        """No pair takes less."""
        a, b = self._transfer.coefficients
        return (a + b * num_bytes) * self._pairs.lowest

    def token_s(self, num_streams: float, num_held: float) -> float:
        """Time per output token of each of `num_streams` that hold `num_held` tokens together."""
        a, b, c, _, _ = self._token.coefficients
        return a + b * num_streams + c * num_held

    def slowdown_s(self, num_held: int) -> float:
        """What one more stream of `num_held` tokens adds to every other's time per token."""
        _, b, c, _, _ = self._token.coefficients
        return b + c * num_held

    @property
    def stall(self) -> float:
        """Seconds by which a stream is held up by each second of prefill on its worker."""
        return self._token.coefficients[3]

    @property
    def neighbour_stall(self) -> float:
        """Seconds by which a stream is held up by each second of prefill on a neighbour of its worker."""
        return self._token.coefficients[4]

    @property
    def num_prefills(self) -> int:
        """Prompts whose cost was seen."""
        return self._prefill.num_observed

    # ---- observations

    def saw_prefill(
        self,
        worker: WorkerKey,
        num_new: int,
        num_cached: int,
        num_streams: int,
        seconds: float,
        num_beside: int = 0,
    ) -> None:
        pairs = num_new * (num_cached + 0.5 * num_new)
        causes = (1.0, num_new, pairs, float(num_new) * num_streams, float(num_new) * num_beside)
        factor = self._speeds.get(worker)
        is_settled = self._prefill.error < SETTLED_ERROR
        self._speeds.learn(worker, self._prefill.predict(causes), seconds, is_settled=is_settled)
        self._prefill.observe(causes, seconds / factor)

    def saw_transfer(self, source: WorkerKey, target: WorkerKey, num_bytes: int, seconds: float) -> None:
        causes = (1.0, float(num_bytes))
        factor = self._pairs.get((source, target))
        self._pairs.learn((source, target), self._transfer.predict(causes), seconds)
        self._transfer.observe(causes, seconds / factor)

    def saw_tokens(
        self, num_streams: float, num_held: float, busy_s: float, tpot_s: float, neighbour_s: float = 0.0
    ) -> None:
        """An answer ended: means over its life, and for each of its tokens the seconds with prompts on its worker and
        on the neighbours of that.
        """
        self._token.observe((1.0, num_streams, num_held, busy_s, neighbour_s), tpot_s)

    def saw_answer(self, num_output_tokens: int) -> None:
        num_output_tokens = max(1, num_output_tokens)
        self.expected_output_tokens += OUTPUT_WEIGHT * (num_output_tokens - self.expected_output_tokens)
        self.lengths.add(num_output_tokens)
