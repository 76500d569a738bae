"""The router without its sockets: events in, effects out.

Life of a request: `submit` accepts it (or raises), places it on a decode worker and, when the prompt is handed over,
on a prefill worker, and sends both their commands under one ticket. Output of the decode worker is checked for
continuity and delivered. When an attempt is lost, the next one starts behind the tokens already delivered. Exactly one
End follows each accepted request.

What a request goes through is in `lifecycle.py`, who is there in `registry.py`, who gets what in `placement.py`.
"""

from __future__ import annotations

import logging
from typing import assert_never

from ..core.clock import Clock
from ..core.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    NodeLost,
    Overloaded,
    ServeError,
    Unavailable,
    describe,
)
from ..core.ids import AttemptKey, IdSource, WorkerKey, new_epoch
from ..protocol.messages import (
    AttemptFailed,
    FromRouter,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Output,
    Peers,
    PrefillEnded,
    ResetPrefixCache,
    Role,
    SetRole,
    Welcome,
)
from .config import RouterConfig, RouterCounters
from .effects import Effect, Send
from .interface import ClusterStatus, GenerateRequest
from .invariants import check_invariants
from .lifecycle import Lifecycle
from .options import Chooser
from .readiness import Readiness
from .registry import Greeting, Registry, Standing, WorkerRecord
from .requests import RequestRecord, State
from .timers import Timers

ORPHAN_GRACE_S = 0.5  # an ended request may still stand in a heartbeat written before its end

log = logging.getLogger(__name__)


class RouterCore:
    """Pure: no socket, no thread, no wait. Every input returns the effects to carry out, in order."""

    def __init__(
        self,
        config: RouterConfig,
        clock: Clock,
        ids: IdSource,
        cluster_key: bytes = b"",
        chooser: Chooser | None = None,
    ) -> None:
        """`chooser` takes the place of the configured policy: for simulations that compare with others."""
        self.config = config
        self.epoch = new_epoch(ids)
        self._clock = clock
        self._registry = Registry()
        self._timers: Timers[str | WorkerKey] = Timers()
        self._life = Lifecycle(config, clock, ids, self.epoch, self._registry, self._timers, cluster_key, chooser)
        self._is_draining = False
        self._readiness = Readiness(config, self._registry, self._life.placer)

    # ---- callers

    def submit(self, request: GenerateRequest) -> list[Effect]:
        """Accept a request; raises BadRequest, Overloaded or Unavailable when it is refused, and then nothing has
        changed.
        """
        table = self._life.table
        if self._is_draining:
            raise Unavailable("the router is draining and takes no new requests")
        if len(table.active) >= self.config.max_active_requests:
            raise Overloaded(f"{len(table.active)} requests are active, the bound is {self.config.max_active_requests}")
        record = table.add(request, self._clock.now())
        try:
            self._check_door(record)
        except ServeError:
            table.discard(record)
            raise
        record.unavailable_at = record.submitted_at + self.config.unavailable_s
        self._life.counters.accepted += 1
        self._life.blame.note_request()
        self._life.has_news = True
        self._life.arm(record)
        return self._flush()

    def cancel(self, request_id: str, choice: int | None = None, error: ServeError | None = None) -> list[Effect]:
        """Stop a request, or one choice of it. Unknown and ended ones are ignored. The End carries `error`."""
        record = self._life.table.active.get(request_id)
        if record is None:
            return []
        if choice is None:
            self._life.end(record, error)
        else:
            chosen = record.choice(choice)
            if chosen is not None:
                self._life.cancel_choice(record, chosen)
        return self._flush()

    def drain(self) -> list[Effect]:
        """Refuse new requests from now on."""
        self._is_draining = True
        return []

    def end_all(self, error: ServeError) -> list[Effect]:
        """End every request: the router stops."""
        self._is_draining = True
        for record in list(self._life.table.active.values()):
            self._life.end(record, error)
        return self._flush()

    def reset_prefix_cache(self) -> list[Effect]:
        self._life.placer.index.clear()
        for worker in self._registry.live():
            self._command(worker, ResetPrefixCache())
        return self._flush()

    def set_role(self, worker_id: str, role: Role) -> list[Effect]:
        """Ask a worker to be for something else; it is once its heartbeat says so. Raises BadRequest."""
        worker = self._registry.current(worker_id)
        if worker is None or not worker.is_live:
            names = ", ".join(other.key.worker_id for other in self._registry.live())
            raise BadRequest(f"worker {worker_id[:64]!r} is not there; there are: {names or 'none'}", "worker")
        if self.config.fixed_roles:
            raise BadRequest(f"roles are fixed here: {self.config.fixed_roles}", "role")
        if role == "prefill" and not any(other.can_decode for other in self._registry.live() if other is not worker):
            raise BadRequest(f"{worker_id} is the only worker that decodes; give another one that role first", "role")
        self._command(worker, SetRole(role))
        return self._flush()

    # ---- workers

    def on_message(self, frame: FromWorker) -> list[Effect]:
        """A message of a worker. Late, doubled and unknown ones are counted and change nothing."""
        key = WorkerKey(frame.worker_id, frame.epoch)
        match frame.body:
            case Hello() as hello:
                self._on_hello(key, hello)
            case Heartbeat() as beat:
                self._on_heartbeat(key, beat)
            case Output() as output:
                self._on_output(key, output)
            case PrefillEnded() as ended:
                self._on_prefill_ended(key, ended)
            case AttemptFailed() as failed:
                self._on_attempt_failed(key, failed)
            case Goodbye():
                self._on_goodbye(key)
            case _:
                assert_never(frame.body)
        return self._flush()

    def worker_lost(self, worker_id: str, reason: str, pid: int | None = None) -> list[Effect]:
        """The worker's process is gone. With a pid, only the incarnation that runs in that process is meant."""
        worker = self._registry.current(worker_id)
        if worker is not None and pid in (None, worker.hello.pid):
            return self.process_ended(worker.key, reason)
        return self._flush()

    def process_ended(self, key: WorkerKey, reason: str) -> list[Effect]:
        """The process of this incarnation is gone, by the word of the kernel."""
        worker = self._registry.find(key)
        if worker is not None:
            self._lose(worker, reason, is_final=True)
        return self._flush()

    # ---- time

    @property
    def next_deadline(self) -> float | None:
        """When `tick` is due; None while nothing is waited for."""
        return self._timers.next()

    def tick(self) -> list[Effect]:
        """Handle every deadline that has come. Safe at any time."""
        for key in self._timers.pop_due(self._clock.now()):
            if isinstance(key, WorkerKey):
                self._on_worker_timer(key)
            elif (record := self._life.table.active.get(key)) is not None:
                self._life.on_timer(record)
        return self._flush()

    # ---- views

    @property
    def counters(self) -> RouterCounters:
        return self._life.counters

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def status(self) -> ClusterStatus:
        workers = self._registry.all()
        why_not = "draining" if self._is_draining else self._readiness.why_not()
        live = self._registry.live()
        return ClusterStatus(
            ready=not why_not,
            why_not_ready=why_not,
            policy=self.config.policy,
            workers=[worker.status(self._life.expected_blocks(worker)) for worker in workers],
            active_requests=len(self._life.table.active),
            queued_requests=len(self._life.table.waiting),
            bytes_per_token=live[0].hello.bytes_per_token if live else 0,
            max_sequence_tokens=self._registry.max_sequence_tokens(),
        )

    def check_invariants(self) -> None:
        """Raise AssertionError where the books do not balance. For tests and the simulation."""
        check_invariants(self.config, self._life, self._registry, self._timers)

    # ---- membership

    def _on_hello(self, key: WorkerKey, hello: Hello) -> None:
        replaced = self._registry.replaced_by(key)
        if replaced is not None:
            self._lose(replaced, f"replaced by {key}", is_final=True)
        before = self._registry.find(key)
        standing = before.standing if before else None
        greeting, worker = self._registry.greet(key, hello, self._clock.now())
        if greeting is Greeting.STALE or worker is None:
            self._life.counters.stale_messages += 1
            return
        self._timers.arm(key, self._clock.now() + self.config.worker_timeout_s)
        if greeting is Greeting.REFUSED:
            if standing is not Standing.REFUSED:
                log.warning("worker %s (%s) refused: %s", key, hello.role, worker.refusal)
            return
        self._command(worker, Welcome())
        if greeting is Greeting.AGAIN:
            self._introduce(worker)
            return
        log.info("worker %s joined: %s, pid %d, %d blocks", key, hello.role, hello.pid, hello.total_blocks)
        self._introduce_all()

    def _on_heartbeat(self, key: WorkerKey, beat: Heartbeat) -> None:
        worker = self._registry.find(key)
        if worker is None:
            self._life.counters.stale_messages += 1
            other = self._registry.current(key.worker_id)
            if beat.received and (other is None or not other.is_live):
                # Welcomed by an earlier router: hearing this one's epoch makes it say Hello again.
                self._life.effects.append(Send(key, FromRouter(self.epoch, 0, Peers([]))))
            return
        if not worker.is_live and not self._take_back(worker):
            self._life.counters.stale_messages += 1
            return
        was_ready, was_stalled, links, role = worker.is_ready, worker.is_stalled, worker.linked, worker.hello.role
        worker.note_heartbeat(beat, self._clock.now())
        if worker.is_ready != was_ready or worker.linked != links:
            self._life.has_news = True
            self._readiness.note_change()
        if worker.hello.role != role:
            log.info("worker %s is for %s now, it was for %s", key, worker.hello.role, role)
            self._readiness.note_change()
            self._introduce_all()
        if worker.is_stalled != was_stalled:
            self._on_stall_change(worker)
        if not worker.is_stalled:
            self._settle(worker, beat)
        self._repeat_introduction(worker)

    def _take_back(self, worker: WorkerRecord) -> bool:
        if not self._registry.take_back(worker, self._clock.now()):
            return False
        log.warning("worker %s speaks again", worker.key)
        self._timers.arm(worker.key, self._clock.now() + self.config.worker_timeout_s)
        self._introduce_all()
        return True

    def _on_goodbye(self, key: WorkerKey) -> None:
        worker = self._registry.find(key)
        if worker is None or worker.is_final:
            self._life.counters.stale_messages += 1
        else:
            self._lose(worker, "said goodbye", is_final=True)

    def _on_worker_timer(self, key: WorkerKey) -> None:
        worker = self._registry.find(key)
        if worker is None or worker.standing is Standing.LOST:
            return
        silent_since = worker.last_seen + self.config.worker_timeout_s
        if self._clock.now() < silent_since:
            self._timers.arm(key, silent_since)
        else:
            self._lose(worker, f"silent for {self.config.worker_timeout_s:g} s", is_final=False)

    def _lose(self, worker: WorkerRecord, reason: str, is_final: bool) -> None:
        was_live = worker.is_live
        self._registry.retire(worker, reason, is_final)
        self._timers.disarm(worker.key)
        if not was_live:
            return
        log.warning("worker %s lost: %s", worker.key, reason)
        self._life.counters.workers_lost += 1
        self._life.placer.forget(worker.key)
        self._life.move_away(worker, NodeLost(f"worker {worker.key.worker_id} was lost: {reason}"))
        self._introduce_all()

    def _on_stall_change(self, worker: WorkerRecord) -> None:
        """Its threads live and its loop does not turn: nothing it runs can be waited for. It keeps its links and its
        memory; when it turns again it finds the Aborts and is used as before.
        """
        if not worker.is_stalled:
            log.warning("worker %s turns again", worker.key)
            return
        log.warning("worker %s hangs: its loop has not turned for %.1f s", worker.key, worker.turn_age_s)
        self._life.counters.workers_stalled += 1
        self._life.move_away(worker, NodeLost(f"worker {worker.key.worker_id} hangs in a step"))

    def _introduce(self, worker: WorkerRecord) -> None:
        worker.peers_sent_at = self._clock.now()
        self._command(worker, Peers(self._registry.peers_of(worker)))

    def _introduce_all(self) -> None:
        self._life.has_news = True
        for worker in self._registry.live():
            self._introduce(worker)

    def _repeat_introduction(self, worker: WorkerRecord) -> None:
        """A decode worker that stays without a link to a prefill worker may have missed its Peers."""
        if worker.hello.role == "prefill":
            return
        if self._clock.now() - worker.peers_sent_at < self.config.unacknowledged_s:
            return
        if any(peer.hello.role == "prefill" and peer.key not in worker.linked for peer in self._registry.live()):
            self._introduce(worker)

    # ---- attempts

    def _settle(self, worker: WorkerRecord, beat: Heartbeat) -> None:
        """Compare the attempts that live on a worker with those that should."""
        active = {AttemptKey(request_id, attempt) for request_id, attempt in beat.active}
        for key in [key for key in worker.attempts if key not in active]:
            record = self._life.current(key)
            if record is not None and self._is_missing(record, worker, beat.received):
                error = NodeLost(f"worker {worker.key.worker_id} no longer knows the attempt")
                self._life.fail_attempt(record, error, (worker.key,))
        for request_id, attempt in beat.active:
            key = AttemptKey(request_id, attempt)
            if not self._is_wanted(key, worker) and not self._ended_lately(request_id):
                self._life.counters.orphans_aborted += 1
                self._life.abort(worker.key, key)

    def _is_missing(self, record: RequestRecord, worker: WorkerRecord, received: int) -> bool:
        attempt = record.attempt
        assert attempt is not None
        if worker.key == attempt.decode:
            return received >= attempt.decode_number
        return received >= attempt.prefill_number and record.state is State.DISPATCHED and not attempt.is_prefill_over

    def _is_wanted(self, key: AttemptKey, worker: WorkerRecord) -> bool:
        record = self._life.current(key)
        return record is not None and record.attempt is not None and worker.key in record.attempt.workers

    def _ended_lately(self, request_id: str) -> bool:
        ended_at = self._life.table.ended_at(request_id)
        return ended_at is not None and self._clock.now() - ended_at < ORPHAN_GRACE_S

    def _on_output(self, key: WorkerKey, output: Output) -> None:
        orphans: dict[AttemptKey, None] = {}
        for item in output.items:
            attempt = AttemptKey(item.request_id, item.attempt)
            record = self._life.current(attempt)
            if record is None or record.attempt is None or record.attempt.decode != key:
                self._life.counters.stale_messages += 1
                orphans[attempt] = None
            else:
                self._life.on_tokens(record, item, output.step)
        for attempt in orphans:
            self._life.abort(key, attempt)

    def _on_prefill_ended(self, key: WorkerKey, ended: PrefillEnded) -> None:
        record = self._life.current(AttemptKey(ended.request_id, ended.attempt))
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

    def _on_attempt_failed(self, key: WorkerKey, failed: AttemptFailed) -> None:
        record = self._life.current(AttemptKey(failed.request_id, failed.attempt))
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

    # ---- small things

    def _check_door(self, record: RequestRecord) -> None:
        longest = self._registry.max_sequence_tokens()
        if longest and record.max_sequence_tokens > longest:
            prompt, output = record.num_prompt_tokens, record.request.params.max_tokens
            raise BadRequest(
                f"prompt of {prompt} tokens plus max_tokens {output} is {prompt + output} tokens, "
                f"this model serves at most {longest}; shorten the prompt or lower max_tokens",
                "max_tokens",
            )
        queued = len(self._life.table.waiting) - 1
        if queued >= self.config.max_queued_requests:
            raise Overloaded(f"{queued} requests wait for a worker, the bound is {self.config.max_queued_requests}")

    def _command(self, worker: WorkerRecord, body: Welcome | Peers | ResetPrefixCache | SetRole) -> None:
        self._life.effects.append(worker.command(self.epoch, body))

    def _flush(self) -> list[Effect]:
        self._life.place_waiting()
        effects, self._life.effects = self._life.effects, []
        return effects
