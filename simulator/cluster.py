"""The real router over simulated workers, on virtual time: each request of a trace once, and when its tokens came."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field

from ..core.errors import ServeError, TooManyRequests
from ..core.ids import AttemptKey, SeededIds, WorkerKey
from ..protocol.messages import (
    Abort,
    Fingerprint,
    FromWorker,
    Heartbeat,
    Hello,
    Output,
    Phases,
    PrefillEnded,
    Role,
    SetRole,
    StartDecode,
    StartPrefill,
    Tokens,
    ToRouter,
)
from ..protocol.sampling import SamplingParams
from ..router.config import RouterConfig
from ..router.core import RouterCore
from ..router.effects import Deliver, Effect, End, Send
from ..router.interface import Decision, GenerateRequest
from ..router.options import Chooser
from .costs import WorkerCosts
from .trace import BLOCK_TOKENS, TraceRequest
from .worker import Prompt, SimulatedWorker, Stream

BEAT_S = 0.5
BOUND_TOKENS = 2048  # max_tokens that clients ask for: the router does not know how long an answer will be
FOREVER_S = 1e8


@dataclass(frozen=True, slots=True)
class Shape:
    """How many workers of each role."""

    num_prefill: int = 0
    num_decode: int = 0
    num_both: int = 0

    def __str__(self) -> str:
        parts = ((self.num_prefill, "P"), (self.num_decode, "D"), (self.num_both, "B"))
        return "+".join(f"{count}{role}" for count, role in parts if count)


@dataclass(slots=True)
class Journey:
    """One request: seconds of virtual time. `error` is empty for a whole answer; a request may be refused at once or
    after it has waited.
    """

    request: TraceRequest
    first_s: float | None = None
    end_s: float | None = None
    num_tokens: int = 0
    num_cached: int = 0
    error: str = ""
    retry_after_s: int = 0  # where it was refused so that it comes again
    decision: Decision | None = None

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        """0 for an answer of one token."""
        assert self.first_s is not None
        assert self.end_s is not None
        return (self.end_s - self.first_s) / max(1, self.num_tokens - 1)


@dataclass(slots=True)
class VirtualClock:
    time_s: float = 0.0

    def now(self) -> float:
        return self.time_s


@dataclass(slots=True)
class _Arrival:
    """A hand-off that reaches its decode worker."""

    prompt: Prompt
    source: WorkerKey
    stream: Stream


_Event = SimulatedWorker | _Arrival | int  # a leap's end, a hand-off's, a request's number


@dataclass(slots=True)
class TraceCluster:
    """Runs once."""

    shape: Shape
    costs: WorkerCosts
    router: RouterConfig
    seed: int = 0
    chooser: Chooser | None = None
    slowdown: float = 1.0  # above 1: the first prefill and the first decode worker share their cores, and so on
    core: RouterCore = field(init=False)
    workers: dict[WorkerKey, SimulatedWorker] = field(init=False, default_factory=dict)
    journeys: dict[str, Journey] = field(init=False, default_factory=dict)
    role_changes: list[tuple[float, str, Role]] = field(init=False, default_factory=list)  # when, who, what for
    _roles: dict[WorkerKey, Role] = field(init=False, default_factory=dict)
    _clock: VirtualClock = field(init=False, default_factory=VirtualClock)
    _heap: list[tuple[float, int, _Event, int]] = field(init=False, default_factory=list)
    _order: itertools.count[int] = field(init=False, default_factory=itertools.count)
    _versions: dict[WorkerKey, int] = field(init=False, default_factory=dict)
    _links: dict[WorkerKey, float] = field(init=False, default_factory=dict)  # when a worker's wire is free again
    _pending: deque[Effect] = field(init=False, default_factory=deque)
    _is_performing: bool = field(init=False, default=False)
    _num_open: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.core = RouterCore(self.router, self._clock, SeededIds(self.seed), chooser=self.chooser)

    def run(self, trace: list[TraceRequest]) -> list[Journey]:
        """The journeys in the trace's order; each request has ended, well or not."""
        self._join_workers()
        for number, request in enumerate(trace):
            self._schedule(request.arrival_s, number)
        next_beat = BEAT_S
        self._num_open = len(trace)
        while self._num_open:
            when = self._heap[0][0] if self._heap else next_beat
            if next_beat <= when:
                self._clock.time_s = next_beat
                self._beat_all()
                self._perform(self.core.tick())
                next_beat += BEAT_S
                continue
            self._clock.time_s, _, event, version = heapq.heappop(self._heap)
            self._handle(event, version, trace)
        return [self.journeys[str(number)] for number in range(len(trace))]

    # ---- workers

    def _join_workers(self) -> None:
        counts: list[tuple[Role, int]] = [
            ("prefill", self.shape.num_prefill),
            ("decode", self.shape.num_decode),
            ("both", self.shape.num_both),
        ]
        for role, count in counts:
            for number in range(count):
                key = WorkerKey(f"{role}-{number:03d}", f"{number:016x}")
                self.workers[key] = SimulatedWorker(key, role == "prefill", self.costs)
                self._roles[key] = role
                self._versions[key] = 0
                self._say(key, self._hello(role))
        if self.slowdown > 1.0:
            self._share_cores()
        self._beat_all()

    def _share_cores(self) -> None:
        prefills = [self.workers[key] for key, role in self._roles.items() if role == "prefill"]
        decodes = [self.workers[key] for key, role in self._roles.items() if role == "decode"]
        for prefill, decode in zip(prefills, decodes, strict=False):
            prefill.share_cores(decode, self.slowdown)
            decode.share_cores(prefill, self.slowdown)

    def _hello(self, role: Role) -> Hello:
        costs = self.costs
        blocks = costs.kv_tokens // BLOCK_TOKENS
        fingerprint = Fingerprint("simulated", "", "bfloat16", 1, 1, 1, BLOCK_TOKENS, "")
        return Hello(role, 1, fingerprint, blocks, costs.kv_tokens, costs.bytes_per_token, "", ["tcp"], 1 << 16)

    def _beat_all(self) -> None:
        able: tuple[Role, ...] = ("prefill", "both") if self.router.balance_roles else ("prefill",)
        sources = [key for key, role in self._roles.items() if role in able]
        for key, worker in self.workers.items():
            others = [source for source in sources if source != key] if self._roles[key] != "prefill" else []
            linked = [self._link(source, worker) for source in others]
            active = [(attempt.request_id, attempt.attempt) for attempt in worker.attempts]
            self._say(key, Heartbeat(worker.received, "ready", worker.load(), active, linked, role=self._roles[key]))

    def _link(self, source: WorkerKey, decode: SimulatedWorker) -> tuple[str, str, str]:
        is_neighbour = decode.neighbour is not None and decode.neighbour.key == source
        return source.worker_id, source.epoch, "shm" if is_neighbour else "tcp"

    def _say(self, key: WorkerKey, body: ToRouter) -> None:
        self._perform(self.core.on_message(FromWorker(key.worker_id, key.epoch, body)))

    # ---- events

    def _schedule(self, when: float, event: _Event, version: int = 0) -> None:
        heapq.heappush(self._heap, (when, next(self._order), event, version))

    def _handle(self, event: _Event, version: int, trace: list[TraceRequest]) -> None:
        if isinstance(event, int):
            self._submit(event, trace[event])
        elif isinstance(event, _Arrival):
            self._arrive(event)
        elif self._versions[event.key] == version:
            result = event.end()
            self._output(event, result.tokens)
            for prompt in result.computed:
                self._hand_over(event, prompt)
            self._go_on(event)

    def _submit(self, number: int, request: TraceRequest) -> None:
        name = str(number)
        self.journeys[name] = Journey(request)
        params = SamplingParams(max_tokens=max(BOUND_TOKENS, request.num_output_tokens))
        asked = GenerateRequest(
            name,
            request.prompt_ids(),
            params,
            FOREVER_S,
            class_name=request.class_name,
            tenant=request.tenant,
        )
        try:
            effects = self.core.submit(asked)
        except ServeError as error:
            self._end(name, error)
        else:
            self._perform(effects)

    def _go_on(self, worker: SimulatedWorker) -> None:
        """Begin the next leap, or cut the one that runs."""
        if worker.leap is None:
            joined = worker.begin(self._clock.now())
            self._schedule_end(worker)
            if worker.neighbour is not None:
                self._cut(worker.neighbour)  # its next steps take longer, or less long
            self._output(worker, joined)
        else:
            self._cut(worker)

    def _cut(self, worker: SimulatedWorker) -> None:
        if worker.leap is not None and worker.leap.num_steps > 1:
            worker.leap.cut(self._clock.now())
            self._schedule_end(worker)

    def _schedule_end(self, worker: SimulatedWorker) -> None:
        if worker.leap is not None:
            self._versions[worker.key] += 1
            self._schedule(worker.leap.end_s, worker, self._versions[worker.key])

    def _output(self, worker: SimulatedWorker, tokens: list[Tokens]) -> None:
        if tokens:
            self._say(worker.key, Output(tokens))

    def _hand_over(self, source: SimulatedWorker, prompt: Prompt) -> None:
        assert prompt.decode is not None
        now, request = self._clock.now(), prompt.request
        missing = request.num_prompt_tokens - self.workers[prompt.decode].held_tokens(request)
        num_bytes = missing * self.costs.bytes_per_token
        prefill_s = now - prompt.begun_s
        free_at = self._links.get(source.key, 0.0)
        arrives_at = max(now, free_at) + self.costs.transfer_s(num_bytes, prefill_s)
        self._links[source.key] = arrives_at
        phases = Phases(
            queue_s=prompt.begun_s - prompt.arrived_s,
            prefill_s=prefill_s,
            transfer_s=arrives_at - now,
            cached_tokens=prompt.num_cached,
            transferred_blocks=-(-missing // BLOCK_TOKENS),
            transferred_bytes=num_bytes,
        )
        self._schedule(arrives_at, _Arrival(prompt, source.key, Stream(prompt.key, request, phases)))

    def _arrive(self, arrival: _Arrival) -> None:
        prompt, source = arrival.prompt, self.workers[arrival.source]
        assert prompt.decode is not None
        decode = self.workers[prompt.decode]
        source.attempts.pop(prompt.key, None)
        if prompt.key in decode.attempts:
            decode.add_stream(arrival.stream)
            decode.retain(prompt.request)
            self._go_on(decode)
        self._say(arrival.source, PrefillEnded(prompt.key.request_id, prompt.key.attempt, True))

    # ---- what the router says

    def _perform(self, effects: list[Effect]) -> None:
        """In order; one may cause more, and those go to the end of the line."""
        self._pending.extend(effects)
        if self._is_performing:
            return
        self._is_performing = True
        while self._pending:
            self._perform_one(self._pending.popleft())
        self._is_performing = False

    def _perform_one(self, effect: Effect) -> None:
        match effect:
            case Send(key, message):
                self.workers[key].received = max(self.workers[key].received, message.number)
                self._command(self.workers[key], message.body)
            case Deliver(name, event):
                journey = self.journeys[name]
                journey.num_tokens += len(event.tokens)
                journey.decision = event.decision or journey.decision
                if journey.first_s is None and event.tokens:
                    journey.first_s = self._clock.now()
                    journey.num_cached = (event.phases or Phases()).cached_tokens
            case End(name, ended):
                self._end(name, ended.error)

    def _end(self, name: str, error: ServeError | None) -> None:
        journey = self.journeys[name]
        assert journey.end_s is None, f"request {name} ended twice"
        journey.end_s = self._clock.now()
        journey.error = "" if error is None else str(error) or error.code
        if isinstance(error, TooManyRequests):
            journey.retry_after_s = error.retry_after_s
        self._num_open -= 1

    def _command(self, worker: SimulatedWorker, body: object) -> None:
        now = self._clock.now()
        if isinstance(body, StartPrefill):
            key = AttemptKey(body.request_id, body.attempt)
            decode = WorkerKey(body.decode_worker, body.decode_epoch)
            worker.attempts[key] = None
            worker.add_prompt(Prompt(key, self.journeys[body.request_id].request, now, decode))
            self._go_on(worker)
        elif isinstance(body, StartDecode):
            key = AttemptKey(body.request_id, body.attempt)
            worker.attempts[key] = None
            if body.ticket is None:
                worker.add_prompt(Prompt(key, self.journeys[body.request_id].request, now))
                self._go_on(worker)
        elif isinstance(body, SetRole):
            self.role_changes.append((now, worker.key.worker_id, body.role))
            self._roles[worker.key] = body.role
            worker.is_prefill_only = body.role == "prefill"
        elif isinstance(body, Abort):
            worker.drop(AttemptKey(body.request_id, body.attempt))
