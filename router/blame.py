"""What failures of attempts mean for the next ones: workers left alone for a while, retries that wait."""

from __future__ import annotations

import logging

from ..core.errors import NodeLost, ServeError
from ..core.ids import WorkerKey
from .breaker import Breakers, Leg
from .config import RouterCounters
from .requests import Attempt
from .retry_budget import RetryBudget

log = logging.getLogger(__name__)


class Blame:
    """Tells breakers and budget of attempts."""

    def __init__(self, breakers: Breakers, counters: RouterCounters, now: float) -> None:
        self._breakers, self._counters, self._retries = breakers, counters, RetryBudget(now)

    def note_request(self) -> None:
        self._retries.note_request()

    def note_attempt(self, attempt: Attempt, now: float) -> None:
        """It goes to its workers."""
        for worker in attempt.workers:
            self._breakers.note_attempt(worker, _leg(attempt, worker), now)

    def note_success(self, attempt: Attempt) -> None:
        """Its first token has come: both legs have worked."""
        for worker in attempt.workers:
            self._breakers.note_success(worker, _leg(attempt, worker))

    def note_failure(self, attempt: Attempt, error: ServeError, blamed: tuple[WorkerKey, ...], now: float) -> None:
        """It has failed on these of its workers."""
        for worker in blamed:
            leg = _leg(attempt, worker)
            if self._breakers.note_failure(worker, leg, error, now):
                self._counters.breakers_opened += 1
                log.warning("worker %s is left alone: attempts to %s there fail in a row: %s", worker, leg, error)

    def retry_wait_s(self, error: ServeError, now: float) -> float:
        """How long a retry waits for the budget. A lost worker's requests go on at once: they are as many as it had."""
        return 0.0 if isinstance(error, NodeLost) else self._retries.take(now)


def _leg(attempt: Attempt, worker: WorkerKey) -> Leg:
    return "decode" if worker == attempt.decode else "prefill"
