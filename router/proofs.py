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
class _Proof:
    """`error`: of the last try, if it failed."""

    proven_at: float | None = None
    error: str = ""
    retry_at: float = 0.0
    pause_s: float = RETRY_S


class Proofs:
    """One for each incarnation and what it is for: a worker that changes its role has to show it anew."""

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self._proofs: dict[tuple[WorkerKey, bool], _Proof] = {}

    def missing(self, worker: WorkerRecord) -> str:
        """Why it does not count as ready; empty when it does."""
        proof = self._of(worker)
        if not self.is_on or (proof is not None and proof.proven_at is not None):
            return ""
        failed = f"canary failed: {proof.error}" if proof is not None and proof.error else ""
        return failed or "has given no token yet"

    def is_due(self, worker: WorkerRecord, idle_s: float, now: float) -> bool:
        """Whether to ask it for a token: it has given none yet, or none for `idle_s` (0: never mind)."""
        proof = self._of(worker)
        if proof is None:
            return True
        if proof.proven_at is None:
            return now >= proof.retry_at
        return 0 < idle_s <= now - proof.proven_at and not worker.attempts

    def note_success(self, worker: WorkerRecord, now: float) -> None:
        """It has done its part of a first token."""
        if self.is_on:
            self._proofs[_name(worker)] = _Proof(proven_at=now)

    def note_failure(self, worker: WorkerRecord, error: ServeError, now: float, *, is_blamed: bool) -> None:
        """A canary has failed; one that another worker is to blame for says nothing of this one."""
        proof = self._proofs.setdefault(_name(worker), _Proof())
        proof.retry_at = now + proof.pause_s
        if is_blamed:
            proof.proven_at, proof.error = None, str(error)
            proof.pause_s = min(2 * proof.pause_s, LONGEST_RETRY_S)

    def forget(self, worker: WorkerKey) -> None:
        """This incarnation is gone."""
        for is_prefill in (False, True):
            self._proofs.pop((worker, is_prefill), None)

    def _of(self, worker: WorkerRecord) -> _Proof | None:
        return self._proofs.get(_name(worker))


def _name(worker: WorkerRecord) -> tuple[WorkerKey, bool]:
    return worker.key, worker.hello.role == "prefill"
