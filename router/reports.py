"""What workers report of attempts: which of them live there, their tokens, their ends."""

from __future__ import annotations

from ..core.clock import Clock
from ..core.errors import BadRequest, Cancelled, DeadlineExceeded, NodeLost, describe
from ..core.ids import AttemptKey, WorkerKey
from ..protocol.messages import AttemptFailed, Heartbeat, Output, PrefillEnded
from .lifecycle import Lifecycle
from .registry import Registry, WorkerRecord
from .requests import RequestRecord, State

ORPHAN_GRACE_S = 0.5  # an ended request may still stand in a heartbeat written before its end


class Reports:
    """Hands what counts to the lifecycle; late, doubled and unknown reports are counted and change nothing."""

    def __init__(self, clock: Clock, registry: Registry, life: Lifecycle) -> None:
        self._clock = clock
        self._registry = registry
        self._life = life

    def settle(self, worker: WorkerRecord, beat: Heartbeat) -> None:
        """Compare the attempts that live on a worker with those that should."""
        active = {AttemptKey(request_id, attempt) for request_id, attempt in beat.active}
        for key in [key for key in worker.attempts if key not in active]:
            record = self._life.books.current(key)
            if record is not None and self._is_missing(record, worker, beat.received):
                error = NodeLost(f"worker {worker.key.worker_id} no longer knows the attempt")
                self._life.fail_attempt(record, error, (worker.key,))
        for request_id, attempt in beat.active:
            key = AttemptKey(request_id, attempt)
            if not self._is_wanted(key, worker) and not self._ended_lately(request_id):
                self._life.counters.orphans_aborted += 1
                self._life.books.abort(worker.key, key)

    def _is_missing(self, record: RequestRecord, worker: WorkerRecord, received: int) -> bool:
        attempt = record.attempt
        assert attempt is not None
        if worker.key == attempt.decode:
            return received >= attempt.decode_number
        return received >= attempt.prefill_number and record.state is State.DISPATCHED and not attempt.is_prefill_over

    def _is_wanted(self, key: AttemptKey, worker: WorkerRecord) -> bool:
        record = self._life.books.current(key)
        return record is not None and record.attempt is not None and worker.key in record.attempt.workers

    def _ended_lately(self, request_id: str) -> bool:
        ended_at = self._life.table.ended_at(request_id)
        return ended_at is not None and self._clock.now() - ended_at < ORPHAN_GRACE_S

    def on_output(self, key: WorkerKey, output: Output) -> None:
        orphans: dict[AttemptKey, None] = {}
        for item in output.items:
            attempt = AttemptKey(item.request_id, item.attempt)
            record = self._life.books.current(attempt)
            if record is None or record.attempt is None or record.attempt.decode != key:
                self._life.counters.stale_messages += 1
                orphans[attempt] = None
            else:
                self._life.on_tokens(record, item, output.step)
        for attempt in orphans:
            self._life.books.abort(key, attempt)

    def on_prefill_ended(self, key: WorkerKey, ended: PrefillEnded) -> None:
        record = self._life.books.current(AttemptKey(ended.request_id, ended.attempt))
        attempt = record.attempt if record else None
        if record is None or attempt is None or attempt.prefill != key:
            # The usual end of a short answer: decode was done before the prefill side had its last word.
            if not self._ended_lately(ended.request_id):
                self._life.counters.stale_messages += 1
            return
        self._life.prefill_over(record, attempt)
        worker = self._registry.find(key)
        if worker is not None:
            worker.attempts.pop(attempt.key, None)
        if not ended.ok and record.state is State.DISPATCHED:
            error = describe(ended.code, ended.message)
            if isinstance(error, BadRequest | DeadlineExceeded):
                self._life.end(record, error)  # no worker is to blame, and none could do better
                return
            self._registry.note_link_error(attempt.decode, key, error)
            self._life.fail_attempt(record, error, (key,))

    def on_attempt_failed(self, key: WorkerKey, failed: AttemptFailed) -> None:
        record = self._life.books.current(AttemptKey(failed.request_id, failed.attempt))
        attempt = record.attempt if record else None
        if record is None or attempt is None or attempt.decode != key:
            self._life.counters.stale_messages += 1
            return
        attempt.is_decode_over = True
        error = describe(failed.code, failed.message)
        if isinstance(error, Cancelled):
            # Whatever the caller has cancelled is over here: what is open is wanted, and its last tokens are missing.
            self._life.break_stream(record, "it ended as cancelled what nobody has cancelled")
            return
        if not failed.retriable:
            self._life.end(record, error)
            return
        self._registry.note_link_error(key, attempt.prefill, error)
        # A broken hand-off has two ends; the message does not say which one broke it.
        self._life.fail_attempt(record, error, attempt.workers if error.retriable else (attempt.decode,))
