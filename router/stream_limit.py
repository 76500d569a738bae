"""How many streams a decode worker may carry before they fall behind their time per token.

    streams = n + (target - t) / slope     for a target above t, the time per token of most answers lately, of n streams
    streams = n · target / t               for one below

The slope is the fitted model's, at most t / n: from where the cluster has been, so that a model that is far off
somewhere else neither lets too many in nor, since few would then teach it nothing new, keeps them out for ever. `t`
contains whatever holds streams up, prompts beside them included.
"""

from __future__ import annotations

from collections import Counter

from .cost_model import CostModel
from .registry import WorkerRecord
from .requests import RequestRecord

MIN_PACES = 16  # answers whose pace must have been seen before anything is limited
WEIGHT = 0.1
NUM_SPREADS = 1.5  # by which most answers are slower than the mean: targets are kept by each, not on average


class StreamLimit:
    """A request keeps its own target and that of every class which has requests here; what one client asks for itself
    holds nobody else back.
    """

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self._shared: Counter[float] = Counter()  # targets of classes → their requests that have not ended
        self._num_paces = 0
        self._streams = 1.0
        self._mean_s = 0.0
        self._spread_s = 0.0

    # ---- who is here

    def enter(self, record: RequestRecord) -> None:
        if record.promise.shared_tpot_s is not None:
            self._shared[record.promise.shared_tpot_s] += 1

    def leave(self, record: RequestRecord) -> None:
        target = record.promise.shared_tpot_s
        if target is not None:
            self._shared[target] -= 1
            if not self._shared[target]:
                del self._shared[target]

    # ---- how fast they are

    def learn(self, num_streams: float, tpot_s: float) -> None:
        """An answer ended; how many streams there were on its worker, itself included, and its time per token."""
        weight = max(WEIGHT, 1.0 / (self._num_paces + 1))
        self._num_paces += 1
        self._streams += weight * (max(1.0, num_streams) - self._streams)
        self._mean_s += weight * (tpot_s - self._mean_s)
        self._spread_s += weight * (abs(tpot_s - self._mean_s) - self._spread_s)

    def pace_s(self, worker: WorkerRecord) -> float:
        """Time per token, as it has been lately; by the model alone before anything was seen."""
        if self._num_paces:
            return self._mean_s
        return self._model.token_s(worker.num_streams, worker.used_blocks * worker.block_size)

    def tpot_s(self, record: RequestRecord) -> float | None:
        """The target that holds where `record` is placed; None while nothing limits it."""
        if self._num_paces < MIN_PACES:
            return None
        own = record.promise.tpot_s
        return min((*self._shared, own) if own is not None else self._shared, default=None)

    def room(self, record: RequestRecord, worker: WorkerRecord, tpot_s: float) -> float:
        """Streams that may join `worker`; below 1 there is no room. One alone always may."""
        pace_s = self._mean_s + NUM_SPREADS * self._spread_s
        if tpot_s < pace_s:
            most = self._streams * tpot_s / pace_s
        else:
            tokens = record.prefill_tokens() + int(self._model.expected_output_tokens / 2)
            slope_s = min(self._model.slowdown_s(tokens), pace_s / self._streams)
            most = self._streams + (tpot_s - pace_s) / max(slope_s, 1e-9)
        return max(most, 1.0) - worker.num_streams
