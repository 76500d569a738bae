"""Which workers are left alone for a while, because attempts fail there that would not fail elsewhere.

A worker may live, say that it is ready, and fail whatever it is given: a full disk, a broken device, a link that takes
nothing. Each of its legs (prefilling for others, decoding) has a breaker:

    closed ──failures in a row──→ open ──after a pause──→ one attempt on trial ──works──→ closed
                                    ↑                              └─fails, the pause doubles─┘

Only failures that the worker is to blame for count: not what the caller did wrong, not a passed deadline, not a worker
whose end is noticed anyway (`registry`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.errors import BadRequest, Cancelled, DeadlineExceeded, NodeLost, Overloaded, ServeError
from ..core.ids import WorkerKey
from .registry import WorkerRecord

Leg = Literal["prefill", "decode"]
LEGS: tuple[Leg, ...] = ("prefill", "decode")
BLAMELESS = (BadRequest, Cancelled, DeadlineExceeded, NodeLost, Overloaded)
LONGEST_PAUSE_S = 30.0


@dataclass(slots=True)
class _Breaker:
    """failures: in a row. until: when an open one lets the next attempt through; pause_s: how long it was open last."""

    failures: int = 0
    until: float | None = None
    pause_s: float = 0.0


class Breakers:
    """One for each leg of each incarnation of a worker that has failed lately."""

    def __init__(self, max_failures: int, pause_s: float) -> None:
        self._max_failures, self._pause_s = max_failures, pause_s
        self._breakers: dict[tuple[WorkerKey, Leg], _Breaker] = {}

    def allowed(self, workers: list[WorkerRecord], leg: Leg, now: float) -> list[WorkerRecord]:
        """Those of them that an attempt may go to."""
        if not self._breakers:
            return workers
        return [worker for worker in workers if self.allows(worker.key, leg, now)]

    def allows(self, worker: WorkerKey, leg: Leg, now: float) -> bool:
        """Whether an attempt may go there; an open breaker lets one through when its pause is over."""
        breaker = self._breakers.get((worker, leg))
        return breaker is None or breaker.until is None or now >= breaker.until

    def is_open(self, worker: WorkerKey, leg: Leg) -> bool:
        breaker = self._breakers.get((worker, leg))
        return breaker is not None and breaker.until is not None

    def open_legs(self, worker: WorkerKey, now: float) -> dict[str, float]:
        """Legs that are left alone, with the seconds until one attempt may find out; 0 while its outcome is awaited
        or nothing comes.
        """
        found = ((leg, self._breakers.get((worker, leg))) for leg in LEGS)
        return {leg: max(0.0, each.until - now) for leg, each in found if each is not None and each.until is not None}

    def note_attempt(self, worker: WorkerKey, leg: Leg, now: float) -> None:
        """An attempt goes there. Through an open breaker it is on trial, and the next one waits for its outcome."""
        breaker = self._breakers.get((worker, leg))
        if breaker is not None and breaker.until is not None:
            breaker.until = now + breaker.pause_s

    def note_success(self, worker: WorkerKey, leg: Leg) -> None:
        """This leg of an attempt has worked."""
        self._breakers.pop((worker, leg), None)

    def note_failure(self, worker: WorkerKey, leg: Leg, error: ServeError, now: float) -> bool:
        """An attempt has failed there. Whether the breaker has opened by it."""
        if isinstance(error, BLAMELESS):
            return False
        breaker = self._breakers.setdefault((worker, leg), _Breaker())
        breaker.failures += 1
        if breaker.failures < self._max_failures:
            return False
        was_open = breaker.until is not None
        breaker.pause_s = min(2 * breaker.pause_s, LONGEST_PAUSE_S) if was_open else self._pause_s
        breaker.until = now + breaker.pause_s
        return not was_open

    def forget(self, worker: WorkerKey) -> None:
        """This incarnation is gone."""
        for leg in LEGS:
            self._breakers.pop((worker, leg), None)
