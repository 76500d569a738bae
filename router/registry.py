"""Which incarnation of which worker is there.

A worker id has one incarnation at a time. A Hello with a new epoch replaces the old one at once. An incarnation that
fell silent may speak again and is taken back; one whose process ended, or that was replaced, never is. Workers whose
fingerprint differs from that of the live ones are refused until those are gone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from ..core.errors import NodeLost, ServeError
from ..core.ids import AttemptKey, WorkerKey
from ..protocol.messages import FromRouter, Heartbeat, Hello, OthersLoad, Peer, ToWorker, WorkerLoad, WorkerState
from .effects import Send
from .interface import WorkerStatus
from .prompt_queue import PromptQueue

MAX_WORKERS = 4096
SAME_MACHINE = frozenset({"shm", "owner", "cuda_ipc"})  # transports that do not leave it
MAX_PAST_EPOCHS = 16
MAX_REMEMBERED_ABORTS = 8192


class Standing(Enum):
    LIVE = "live"
    REFUSED = "refused"
    LOST = "lost"


class Greeting(Enum):
    """What a Hello turned out to be."""

    STALE = "stale"
    AGAIN = "again"
    JOINED = "joined"
    REFUSED = "refused"


@dataclass(slots=True, eq=False)
class WorkerRecord:
    """One incarnation: what it said last, and what the router has given it."""

    key: WorkerKey
    hello: Hello
    last_seen: float
    standing: Standing = Standing.LIVE
    refusal: str = ""
    is_final: bool = False  # lost and never taken back
    is_welcomed: bool = False
    restarts: int = 0
    state: WorkerState = "starting"
    load: WorkerLoad = field(default_factory=WorkerLoad)
    linked: dict[WorkerKey, str] = field(default_factory=dict)
    neighbours: tuple[WorkerKey, ...] = ()  # linked workers on the same machine, by the transport
    received: int = 0
    last_number: int = 0
    turn_age_s: float = 0.0  # since its loop began its last turn
    peers_sent_at: float = 0.0
    attempts: dict[AttemptKey, None] = field(default_factory=dict)  # in order of dispatch
    # What it carries: by the router's own books, and beside these `others`, as its last heartbeat says.
    others: OthersLoad = OthersLoad()  # noqa: RUF009  # frozen
    used_blocks: int = 0  # of the attempts it decodes
    queued_tokens: int = 0  # prompt tokens sent here whose first token has not come
    prompts: PromptQueue = field(default_factory=PromptQueue)  # sent here to be computed
    num_streams: int = (
        0  # open choices of the attempts it decodes, those that still wait for their first token included
    )
    num_running: int = 0  # of them, those that have had it
    block_size: int = field(init=False)  # tokens
    _aborts: dict[tuple[AttemptKey, int | None], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.block_size = max(1, self.hello.fingerprint.block_size)

    @property
    def is_live(self) -> bool:
        return self.standing is Standing.LIVE

    @property
    def is_ready(self) -> bool:
        return self.is_live and self.state == "ready"

    @property
    def is_stalled(self) -> bool:
        return self.is_live and self.state == "stalled"

    @property
    def can_decode(self) -> bool:
        return self.hello.role in ("decode", "both")

    @property
    def can_prefill(self) -> bool:
        return self.hello.role in ("prefill", "both")

    @property
    def is_at_work(self) -> bool:
        return self.num_running > 0 or self.prompts.num_prompts > 0

    @property
    def has_place(self) -> bool:
        """It would not refuse one more attempt; one at a time is always worth trying."""
        return len(self.attempts) + self.others.attempts < max(1, self.hello.max_requests)

    @property
    def is_idle(self) -> bool:
        """No router has an attempt here."""
        return not self.attempts and not self.others.attempts

    def command(self, router_epoch: str, body: ToWorker) -> Send:
        """The next numbered command to this incarnation."""
        self.last_number += 1
        return Send(self.key, FromRouter(router_epoch, self.last_number, body))

    def note_heartbeat(self, beat: Heartbeat, now: float) -> None:
        self.last_seen = now
        # A beat that was overtaken by a younger one says nothing new about the load.
        if beat.received < self.received:
            return
        self.received, self.state, self.load = beat.received, beat.state, beat.load
        self.turn_age_s = beat.turn_age_s
        if beat.role not in (None, self.hello.role):
            self.hello = msgspec.structs.replace(self.hello, role=beat.role)
        linked = {WorkerKey(worker_id, epoch): transport for worker_id, epoch, transport in beat.linked}
        if linked != self.linked:
            self.linked = linked
            self.neighbours = tuple([peer for peer, transport in linked.items() if transport in SAME_MACHINE])
        self._note_others(beat.others or OthersLoad())

    def _note_others(self, others: OthersLoad) -> None:
        """Another router's attempts weigh like this one's own, for whoever looks for room or for the least load."""
        before, self.others = self.others, others
        self.used_blocks += others.blocks - before.blocks
        self.queued_tokens += others.queued_tokens - before.queued_tokens
        self.num_streams += others.streams - before.streams
        self.num_running += others.running - before.running

    def note_abort(self, attempt: AttemptKey, choice: int | None, now: float, repeat_s: float) -> bool:
        """Whether an Abort is due: the same one goes out again only when `repeat_s` have passed."""
        while self._aborts:
            oldest = next(iter(self._aborts))
            if now - self._aborts[oldest] < repeat_s and len(self._aborts) < MAX_REMEMBERED_ABORTS:
                break
            del self._aborts[oldest]
        if (attempt, choice) in self._aborts or (attempt, None) in self._aborts:
            return False
        self._aborts[(attempt, choice)] = now
        return True

    def status(self, expected_blocks: int = 0) -> WorkerStatus:
        state = self.state if self.is_live else self.standing.value
        has_load = self.load.total_blocks > 0
        return WorkerStatus(
            worker_id=self.key.worker_id,
            epoch=self.key.epoch,
            role=self.hello.role,
            pid=self.hello.pid,
            state=f"{state}: {self.refusal}" if self.standing is Standing.REFUSED else state,
            load=self.load,
            running=self.load.running,
            waiting=self.load.waiting,
            free_blocks=self.load.free_blocks if has_load else self.hello.total_blocks,
            total_blocks=self.load.total_blocks if has_load else self.hello.total_blocks,
            transports={peer.worker_id: transport for peer, transport in sorted(self.linked.items())},
            restarts=self.restarts,
            dtype=self.hello.fingerprint.dtype,
            turn_age_s=self.turn_age_s,
            num_attempts=len(self.attempts),
            expected_blocks=expected_blocks,
            block_size=self.block_size,
        )


class Registry:
    """All workers by id. At most MAX_WORKERS; lost ones make room."""

    def __init__(self) -> None:
        self._records: dict[str, WorkerRecord] = {}
        self._past: dict[str, deque[str]] = {}
        self._ordered: list[WorkerRecord] = []  # by worker id

    def __len__(self) -> int:
        return len(self._records)

    def find(self, key: WorkerKey) -> WorkerRecord | None:
        """The record of exactly this incarnation, whatever its standing."""
        record = self._records.get(key.worker_id)
        return record if record is not None and record.key == key else None

    def neighbours_at_work(self, record: WorkerRecord) -> int:
        """How many workers compute beside it: prefill workers linked to it on the same machine, decode workers so
        linked to it.
        """
        found = [self.find(key) for key in record.neighbours]
        found += [other for other in self._ordered if other.neighbours and record.key in other.neighbours]
        return sum([other is not None and other.is_at_work for other in found])

    def current(self, worker_id: str) -> WorkerRecord | None:
        return self._records.get(worker_id)

    def note_link_error(self, decode: WorkerKey, prefill: WorkerKey | None, error: ServeError) -> None:
        """One end says that the other is gone: no hand-off between the two until a heartbeat names the link again."""
        record = self.find(decode)
        if record is not None and prefill is not None and isinstance(error, NodeLost):
            record.linked = {peer: transport for peer, transport in record.linked.items() if peer != prefill}

    def all(self) -> list[WorkerRecord]:
        return list(self._ordered)

    def live(self) -> list[WorkerRecord]:
        return [record for record in self._ordered if record.standing is Standing.LIVE]

    def ready(self) -> list[WorkerRecord]:
        """Live ones that take work."""
        return [record for record in self._ordered if record.state == "ready" and record.standing is Standing.LIVE]

    def peers_of(self, record: WorkerRecord) -> list[Peer]:
        """Everyone else who is live."""
        return [
            Peer(other.key.worker_id, other.key.epoch, other.hello.role, other.hello.kv_address)
            for other in self.live()
            if other is not record
        ]

    def max_sequence_tokens(self) -> int:
        """Longest prompt + output that some live worker can decode; 0 without one."""
        return max((record.hello.max_sequence_tokens for record in self.live() if record.can_decode), default=0)

    def greet(self, key: WorkerKey, hello: Hello, now: float) -> tuple[Greeting, WorkerRecord | None]:
        """Take a Hello in. The caller has retired the incarnation that it replaces, see `replaced_by`."""
        record = self._records.get(key.worker_id)
        if key.epoch in self._past.get(key.worker_id, ()) or (record and record.key == key and record.is_final):
            return Greeting.STALE, record
        if record is None or record.key != key:
            if not self._make_room(key.worker_id):
                return Greeting.STALE, None
            record = self._replace(record, key, hello, now)
        elif record.is_live:
            record.last_seen = now
            return Greeting.AGAIN, record
        return self._admit(record, now), record

    def replaced_by(self, key: WorkerKey) -> WorkerRecord | None:
        """The live incarnation that a Hello from `key` would end."""
        record = self._records.get(key.worker_id)
        if record is None or record.key == key or not record.is_live or key.epoch in self._past.get(key.worker_id, ()):
            return None
        return record

    def take_back(self, record: WorkerRecord, now: float) -> bool:
        """A silent incarnation speaks again. False when it has to stay out."""
        if record.is_final or not record.is_welcomed:
            return False
        return self._admit(record, now) is Greeting.JOINED

    def retire(self, record: WorkerRecord, reason: str, is_final: bool) -> None:
        """Take an incarnation out; nothing it holds counts any more."""
        record.standing, record.refusal, record.is_final = Standing.LOST, reason, record.is_final or is_final
        record.linked = {}

    def _admit(self, record: WorkerRecord, now: float) -> Greeting:
        record.last_seen = now
        reference = next((other for other in self.live() if other is not record), None)
        difference = reference and record.hello.fingerprint.difference(reference.hello.fingerprint)
        if reference and difference:
            record.standing, record.refusal = Standing.REFUSED, f"{difference}, at worker {reference.key}"
            return Greeting.REFUSED
        record.standing, record.refusal, record.is_welcomed = Standing.LIVE, "", True
        return Greeting.JOINED

    def _replace(self, old: WorkerRecord | None, key: WorkerKey, hello: Hello, now: float) -> WorkerRecord:
        record = WorkerRecord(key, hello, now, Standing.LOST)
        if old is not None:
            self._past.setdefault(key.worker_id, deque(maxlen=MAX_PAST_EPOCHS)).append(old.key.epoch)
            record.restarts = old.restarts + 1
        self._records[key.worker_id] = record
        self._reorder()
        return record

    def _reorder(self) -> None:
        self._ordered = [self._records[worker_id] for worker_id in sorted(self._records)]

    def _make_room(self, worker_id: str) -> bool:
        if worker_id in self._records or len(self._records) < MAX_WORKERS:
            return True
        gone = min((r for r in self._records.values() if not r.is_live), key=lambda r: r.last_seen, default=None)
        if gone is None:
            return False
        del self._records[gone.key.worker_id]
        self._past.pop(gone.key.worker_id, None)
        self._reorder()
        return True
