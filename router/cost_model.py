"""What things cost here, in seconds, fitted while the cluster runs from what the router sees anyway.

    prefill    n tokens to compute behind c cached ones, beside b running streams: a + b·n + c·n·(c + n/2) + d·n·b
    transfer   bytes of KV from one worker to another: a + b·bytes, times how this pair compares with the others
    token      time per output token with b streams that hold t tokens and p seconds with prompts beside each token

Each worker has a factor: how much longer prefill takes there than the line says. All of it is pure and deterministic:
the same observations in the same order give the same predictions. Before the first observation the priors speak; they
say only that local work costs less than local work and a transfer.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from ..core.ids import WorkerKey
from .answer_lengths import AnswerLengths
from .regression import Regression

K = TypeVar("K", bound=Hashable)

PREFILL_PRIOR = (0.005, 1e-4, 1e-9, 1e-6)  # s, s/token, s/token², s/(token·stream)
TRANSFER_PRIOR = (0.001, 1e-9)  # s, s/byte
TOKEN_PRIOR = (0.01, 5e-4, 1e-7, 1.0)  # s, s/stream, s/token held, s/s
FACTOR_WEIGHT = 0.1
FACTOR_BOUNDS = (0.2, 5.0)
MAX_FACTORS = 8192
OUTPUT_PRIOR = 128.0  # tokens
OUTPUT_WEIGHT = 0.02


class Factors(Generic[K]):
    """How one of many compares with the common line; 1 for what was never seen. Least recently learned ones go."""

    def __init__(self) -> None:
        self._values: OrderedDict[K, float] = OrderedDict()

    def get(self, key: K) -> float:
        return self._values.get(key, 1.0)

    def learn(self, key: K, predicted: float, seen: float) -> None:
        """`predicted` is what the line alone says."""
        if not (predicted > 0 and seen > 0 and math.isfinite(seen / predicted)):
            return
        low, high = FACTOR_BOUNDS
        value = self.get(key)
        value += FACTOR_WEIGHT * (min(high, max(low, seen / predicted)) - value)
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > MAX_FACTORS:
            self._values.popitem(last=False)


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

    # ---- predictions

    def prefill_s(self, worker: WorkerKey, num_new: int, num_cached: int, num_streams: int = 0) -> float:
        """To compute `num_new` tokens behind `num_cached` ones, while `num_streams` decode on the same worker."""
        a, b, c, d = self._prefill.coefficients
        line = a + num_new * (b + c * (num_cached + 0.5 * num_new) + d * num_streams)
        return line * self._speeds.get(worker)

    def transfer_s(self, source: WorkerKey, target: WorkerKey, num_bytes: int) -> float:
        """From the end of prefill until decode has it all."""
        a, b = self._transfer.coefficients
        return (a + b * num_bytes) * self._pairs.get((source, target))

    def token_s(self, num_streams: float, num_held: float) -> float:
        """Time per output token of each of `num_streams` that hold `num_held` tokens together."""
        a, b, c, _ = self._token.coefficients
        return a + b * num_streams + c * num_held

    def slowdown_s(self, num_held: int) -> float:
        """What one more stream of `num_held` tokens adds to every other's time per token."""
        _, b, c, _ = self._token.coefficients
        return b + c * num_held

    @property
    def stall(self) -> float:
        """Seconds by which a stream is held up by each second of prefill on its worker."""
        return self._token.coefficients[3]

    @property
    def num_prefills(self) -> int:
        """Prompts whose cost was seen."""
        return self._prefill.num_observed

    # ---- observations

    def saw_prefill(self, worker: WorkerKey, num_new: int, num_cached: int, num_streams: int, seconds: float) -> None:
        causes = (1.0, num_new, num_new * (num_cached + 0.5 * num_new), float(num_new) * num_streams)
        factor = self._speeds.get(worker)
        self._speeds.learn(worker, self._prefill.predict(causes), seconds)
        self._prefill.observe(causes, seconds / factor)

    def saw_transfer(self, source: WorkerKey, target: WorkerKey, num_bytes: int, seconds: float) -> None:
        causes = (1.0, float(num_bytes))
        factor = self._pairs.get((source, target))
        self._pairs.learn((source, target), self._transfer.predict(causes), seconds)
        self._transfer.observe(causes, seconds / factor)

    def saw_tokens(self, num_streams: float, num_held: float, busy_s: float, tpot_s: float) -> None:
        """An answer ended: means over its life, and the seconds with prompts on its worker for each of its tokens."""
        self._token.observe((1.0, num_streams, num_held, busy_s), tpot_s)

    def saw_answer(self, num_output_tokens: int) -> None:
        num_output_tokens = max(1, num_output_tokens)
        self.expected_output_tokens += OUTPUT_WEIGHT * (num_output_tokens - self.expected_output_tokens)
        self.lengths.add(num_output_tokens)
