"""Which workers have shown that they work: each gives one token before it counts as ready, to anyone.

A worker that is for prefill is proven by a hand-off, one that decodes by any answer that has begun there.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import ServeError
from ..core.ids import WorkerKey
from .registry import WorkerRecord

RETRY_S = 1.0  # after a failure; doubles
LONGEST_RETRY_S = 30.0


@dataclass(slots=True)
class _Shown:
    """`error`: of the last try, if it failed."""

    proven_at: float | None = None
    error: str = ""
    retry_at: float = 0.0
    pause_s: float = RETRY_S


class Evidence:
    """One for each incarnation and what it is for: a worker that changes its role has to show it anew."""

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self._shown: dict[tuple[WorkerKey, bool], _Shown] = {}

    def missing(self, worker: WorkerRecord) -> str:
        """Why it does not count as ready; empty when it does."""
        shown = self._of(worker)
        if not self.is_on or (shown is not None and shown.proven_at is not None):
            return ""
        failed = f"canary failed: {shown.error}" if shown is not None and shown.error else ""
        return failed or "has given no token yet"

    def is_due(self, worker: WorkerRecord, idle_s: float, now: float) -> bool:
        """Whether to ask it for a token: it has given none yet, or none for `idle_s` (0: never mind)."""
        shown = self._of(worker)
        if shown is None:
            return True
        if shown.proven_at is None:
            return now >= shown.retry_at
        return 0 < idle_s <= now - shown.proven_at and not worker.attempts

    def note_success(self, worker: WorkerRecord, now: float) -> None:
        """It has done its part of a first token."""
        if self.is_on:
            self._shown[_name(worker)] = _Shown(proven_at=now)

    def note_failure(self, worker: WorkerRecord, error: ServeError, now: float, *, is_blamed: bool) -> None:
        """A canary has failed; one that another worker is to blame for says nothing of this one."""
        shown = self._shown.setdefault(_name(worker), _Shown())
        shown.retry_at = now + shown.pause_s
        if is_blamed:
            shown.proven_at, shown.error = None, str(error)
            shown.pause_s = min(2 * shown.pause_s, LONGEST_RETRY_S)

    def forget(self, worker: WorkerKey) -> None:
        """This incarnation is gone."""
        for is_prefill in (False, True):
            self._shown.pop((worker, is_prefill), None)

    def _of(self, worker: WorkerRecord) -> _Shown | None:
        return self._shown.get(_name(worker))


def _name(worker: WorkerRecord) -> tuple[WorkerKey, bool]:
    return worker.key, worker.hello.role == "prefill"
