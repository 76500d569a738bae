"""The router without its sockets: events in, effects out.

Life of a request: `submit` accepts it (or raises), places it on a decode worker and, when the prompt is handed over,
on a prefill worker, and sends both their commands under one ticket. Output of the decode worker is checked for
continuity and delivered. When an attempt is lost, the next one starts behind the tokens already delivered. Exactly one
End follows each accepted request.

What a request goes through is in `lifecycle.py`, what workers say of it in `reports.py`, who is there in
`membership.py` and `registry.py`, who gets what in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, assert_never

from msgspec.structs import replace

from ..core.clock import Clock
from ..core.errors import (
    BadRequest,
    Overloaded,
    ServeError,
    Unavailable,
)
from ..core.ids import IdSource, WorkerKey, new_epoch
from ..protocol.messages import (
    AttemptFailed,
    BlockNews,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Output,
    PrefillEnded,
    ResetPrefixCache,
    Role,
    SetRole,
)
from .balance import RoleBalance
from .canary import Canaries
from .config import RouterConfig, RouterCounters
from .effects import Effect
from .interface import ClusterStatus, GenerateRequest, WorkerStatus
from .invariants import check_invariants
from .lifecycle import Lifecycle
from .membership import Membership
from .options import Chooser
from .readiness import Readiness
from .registry import Registry, WorkerRecord
from .reports import Reports
from .requests import RequestRecord
from .timers import Timers

Chore = Literal["balance", "canary"]  # what is looked after now and then, whatever comes
CHORE_S = 1.0


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
        self._reports = Reports(clock, self._registry, self._life)
        self._members = Membership(
            config, clock, self.epoch, self._registry, self._timers, self._life, self._reports, self._readiness
        )
        self._balance = RoleBalance(config, self._registry, self._life, self._order_role)
        self._chores: Timers[Chore] = Timers()
        self._canaries = Canaries(config, clock, ids, self._registry, self._life, self._readiness.note_change)
        self._chores_of: dict[Chore, Callable[[], None]] = {}
        if self._balance.is_on:
            self._chores_of["balance"] = lambda: self._balance.look(clock.now())
        if self._canaries.is_on:
            self._chores_of["canary"] = self._canaries.look
        for chore in self._chores_of:
            self._chores.arm(chore, clock.now() + CHORE_S)

    # ---- callers

    def submit(self, request: GenerateRequest) -> list[Effect]:
        """Accept a request; raises BadRequest, Overloaded, TooManyRequests or Unavailable when it is refused, and then
        it has left nothing behind.
        """
        table = self._life.table
        if self._is_draining:
            raise Unavailable("the router is draining and takes no new requests")
        if len(table.active) >= self.config.max_active_requests:
            self._life.door.note_refused(request, "active")
            raise Overloaded(f"{len(table.active)} requests are active, the bound is {self.config.max_active_requests}")
        record = table.add(request, self._clock.now())
        try:
            self._check_door(record)
        except ServeError:
            table.discard(record)
            raise
        self._life.door.accept(record)
        table.enqueue(record)
        record.unavailable_at = record.submitted_at + self.config.unavailable_s
        self._life.counters.accepted += 1
        self._life.blame.note_request()
        self._life.offered.note_request(record.num_prompt_tokens, record.submitted_at)
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
            self._members.command(worker, ResetPrefixCache())
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
        self._balance.note_manual(worker, role, self._clock.now())
        self._order_role(worker, role)
        return self._flush()

    def _order_role(self, worker: WorkerRecord, role: Role) -> None:
        self._members.command(worker, SetRole(role))

    # ---- workers

    def on_message(self, frame: FromWorker) -> list[Effect]:
        """A message of a worker. Late, doubled and unknown ones are counted and change nothing."""
        key = WorkerKey(frame.worker_id, frame.epoch)
        match frame.body:
            case Hello() as hello:
                self._members.on_hello(key, hello)
            case Heartbeat() as beat:
                self._members.on_heartbeat(key, beat)
                if self._canaries.is_on and not self._is_draining:
                    self._canaries.heard(key)
            case Output() as output:
                self._reports.on_output(key, output)
            case PrefillEnded() as ended:
                self._reports.on_prefill_ended(key, ended)
            case AttemptFailed() as failed:
                self._reports.on_attempt_failed(key, failed)
            case BlockNews() as news:
                self._members.on_block_news(key, news)
            case Goodbye():
                self._members.on_goodbye(key)
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
            self._members.lose(worker, reason, is_final=True)
        return self._flush()

    # ---- time

    @property
    def next_deadline(self) -> float | None:
        """When `tick` is due; None while nothing is waited for."""
        return min((when for when in (self._timers.next(), self._chores.next()) if when is not None), default=None)

    def tick(self) -> list[Effect]:
        """Handle every deadline that has come. Safe at any time."""
        for key in self._timers.pop_due(self._clock.now()):
            if isinstance(key, WorkerKey):
                self._members.on_worker_timer(key)
            elif (record := self._life.table.active.get(key)) is not None:
                self._life.on_timer(record)
        for chore in self._chores.pop_due(self._clock.now()):
            if not self._is_draining:
                self._chores_of[chore]()
            self._chores.arm(chore, self._clock.now() + CHORE_S)
        return self._flush()

    # ---- views

    @property
    def counters(self) -> RouterCounters:
        return self._life.counters

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def status(self) -> ClusterStatus:
        why_not = "draining" if self._is_draining else self._readiness.why_not()
        live = self._registry.live()
        return ClusterStatus(
            ready=not why_not,
            why_not_ready=why_not,
            policy=self.config.policy,
            workers=[self._row(worker) for worker in self._registry.all()],
            active_requests=len(self._life.table.active) - self._life.num_canaries,
            queued_requests=len(self._life.table.waiting),
            bytes_per_token=live[0].hello.bytes_per_token if live else 0,
            max_sequence_tokens=self._registry.max_sequence_tokens(),
            classes=self._life.door.status(),
            balances_roles=self._balance.is_on,
            role_changes=self._balance.changes(self._clock.now()),
            role_change_counts=self._balance.counts(),
        )

    def _row(self, worker: WorkerRecord) -> WorkerStatus:
        legs = self._life.placer.breakers.open_legs(worker.key, self._clock.now())
        missing = self._life.placer.evidence.missing(worker) if worker.is_ready else ""
        row = worker.status(self._life.books.expected_blocks(worker))
        return replace(row, breakers=legs, canary=missing)

    def check_invariants(self) -> None:
        """Raise AssertionError where the books do not balance. For tests and the simulation."""
        check_invariants(self.config, self._life, self._registry, self._timers)

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
        queued = len(self._life.table.waiting)
        if queued >= self.config.max_queued_requests:
            self._life.door.note_refused(record.request, "queued")
            raise Overloaded(f"{queued} requests wait for a worker, the bound is {self.config.max_queued_requests}")
        self._life.door.introduce(record, self._clock.now())

    def _flush(self) -> list[Effect]:
        self._life.place_waiting()
        effects = list(self._life.effects)
        self._life.effects.clear()
        return effects
