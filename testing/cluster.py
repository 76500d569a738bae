"""A whole cluster on virtual time: the real router core, the real worker cores, simulated wires, faults from a seed.

    clients ─submit→ RouterCore ─frames over Wire→ SimWorker(WorkerCore, FakeEngine) ─SimMesh→ SimWorker
Everything that happens is shown to a `Watch`, which checks the invariants.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ..core.errors import ServeError, Unavailable
from ..core.ids import MAIN_ROUTER, SeededIds, WorkerKey, new_epoch
from ..engine.block_pool import BlockPool
from ..engine.interface import ScheduledSeq
from ..engine.kv_memory import KVMemory
from ..kvtransfer.transports.inproc import InprocMesh
from ..protocol import codec
from ..protocol.messages import FromRouter, FromWorker, Push, Role
from ..protocol.sampling import SamplingParams
from ..router.config import RouterConfig
from ..router.core import RouterCore
from ..router.effects import Deliver, Effect, End, Send
from ..router.interface import GenerateRequest
from .chaos import ChaosProfile, Wire
from .clock import FakeClock
from .events import EventQueue
from .fake_engine import FakeEngine
from .history import HistoryWriter
from .invariants import InvariantBroken, guarded
from .journal import Journal
from .second_router import NAME as SECOND
from .second_router import SecondPlan, SecondRouter
from .sim_memory import SimMemory
from .sim_network import SimNetwork
from .sim_parking import SimParking
from .sim_worker import CLUSTER_KEY, SimWorker, WorkerSizes
from .situation import situation
from .story import tell
from .strangers import strange_command, strange_report
from .tap import ROUTER, Crossing, Tap
from .watch import Watch, check_empty

ROUTER_TICK_S = 0.1
HEALTH_EVERY = 5  # router ticks
LONG_S = 1000.0  # longer than any timer that a worker has


@dataclass(frozen=True, slots=True)
class ClusterShape(WorkerSizes):
    """Sizes of a simulated cluster. Pools are tiny on purpose: that is where block bugs live.

    `num_foreign`: prefill workers with other weights, which must be kept out.
    """

    num_prefill: int = 1
    num_decode: int = 1
    num_both: int = 0
    num_foreign: int = 0
    num_blocks: int = 24
    block_size: int = 4
    step_s: float = 0.002
    park_blocks: int = 0  # host memory of each decode worker
    park_copy_s: float = 0.0  # what copying a sequence seems to take
    one_pool: bool = False  # all workers keep their blocks in one memory, and give them to each other
    keep_prefix: bool = True
    restart_s: float = 0.5
    router: RouterConfig = field(default_factory=RouterConfig)

    def roles(self) -> dict[str, Role]:
        """Worker id → role, of all that begin."""
        numbers: list[tuple[str, Role, int]] = [
            ("prefill", "prefill", self.num_prefill),
            ("decode", "decode", self.num_decode),
            ("both", "both", self.num_both),
            ("foreign", "prefill", self.num_foreign),
        ]
        return {f"{name}-{i}": role for name, role, number in numbers for i in range(number)}


class SimCluster:
    """One run. Everything random comes from `rng`; `trace` hears of every message, `history` of what clients see."""

    def __init__(
        self,
        shape: ClusterShape,
        profile: ChaosProfile,
        seed: int,
        trace: Callable[[str], None] | None = None,
        history: HistoryWriter | None = None,
    ) -> None:
        self.shape, self.profile = shape, profile
        self._seed = seed
        self.rng, self._ids = random.Random(seed), SeededIds(seed)
        self._park_rng = random.Random(f"parking {seed}")
        self.clock = FakeClock()
        self.events = EventQueue(self.clock)
        self.faults: Counter[str] = Counter()
        self.journal = Journal(history)
        self.network = SimNetwork(self.events, profile, self.rng, self.faults)
        self.watch = Watch(
            self.clock,
            self.journal,
            shape.router,
            profile,
            self.network.silent_ends,
            lease_s=shape.lease_s,
            max_step_s=shape.max_step_s,
        )
        self.network.check_copy, self.network.check_leaving = self._check_copy, self.watch.leaves
        self.network.check_gift = self._check_gift
        self.network.trace = self.say if trace is not None else None
        self.tap = Tap()
        self._trace = trace
        self.router = RouterCore(shape.router, self.clock, self._ids, CLUSTER_KEY)
        self.workers: dict[str, SimWorker] = {}
        self._engines: list[FakeEngine] = []  # of all incarnations
        self._wires: dict[WorkerKey, tuple[Wire, Wire]] = {}
        self.is_calm = False
        self._num_ticks = 0
        self._memory: SimMemory | None = None
        if shape.one_pool:
            self._memory = SimMemory(shape.roles(), shape.num_blocks, shape.block_size, shape.keep_prefix)
            self.watch.blocks.check_memory = self._memory.check
        self.second: SecondRouter | None = None
        for name, role in shape.roles().items():
            self.start_worker(name, role)
        self.events.after(ROUTER_TICK_S, self._tick_router, is_awaited=False)

    def add_second_router(self, plan: SecondPlan) -> SecondRouter:
        """Another router on the same workers; see `second_router.py`."""
        shape, journal, rng = self.shape, Journal(), random.Random(f"second router {self._seed}")
        sizes = {"lease_s": shape.lease_s, "max_step_s": shape.max_step_s}
        watch = Watch(self.clock, journal, shape.router, self.profile, lambda *_: [], **sizes, blocks=self.watch.blocks)
        self.second = SecondRouter(
            plan,
            watch,
            lambda ids: RouterCore(shape.router, self.clock, ids, CLUSTER_KEY),
            SeededIds(self._seed + 1),
            lambda: Wire(self.events, self.profile, rng, self.faults),
            self._to_worker,
            self._tell_gone,
            self.events.after,
            self.say,
            self.faults,
        )
        return self.second

    def _tell_gone(self, router: str) -> None:
        for worker in self.workers.values():
            worker.on_router_gone(router)

    def _router_names(self) -> list[str]:
        return [MAIN_ROUTER, SECOND] if self.second is not None else [MAIN_ROUTER]

    def close(self) -> None:
        """Give the memory of all incarnations back."""
        for engine in self._engines:
            engine.close()

    # ---- workers ----

    def start_worker(self, worker_id: str, role: Role) -> None:
        key = WorkerKey(worker_id, new_epoch(self._ids))
        down, up = (Wire(self.events, self.profile, self.rng, self.faults) for _ in range(2))
        down.is_calm = up.is_calm = self.is_calm
        self._wires[key] = (down, up)
        self.workers[worker_id] = SimWorker(
            key,
            role,
            self.make_engine(role, "foreign" if worker_id.startswith("foreign") else "fake"),
            self.events,
            self.network,
            lambda router, frame: self._from_worker(router, key, frame),
            self._router_names,
            self.watch,
            self._on_exit,
            self.shape,
            self._make_parking,
            self._memory.join(worker_id) if self._memory is not None else None,
        )
        self._engines.append(self.workers[worker_id].engine)
        self.say(f"{tell(key)} starts")

    def _make_parking(self, memory: KVMemory, pool: BlockPool) -> SimParking:
        shape = self.shape
        return SimParking(memory, pool, shape.park_blocks, shape.park_copy_s, self.faults, self._spoils_parked)

    def _spoils_parked(self) -> bool:
        return not self.is_calm and self._park_rng.random() < self.profile.corrupt_parked

    def make_engine(self, role: Role, weights: str = "fake") -> FakeEngine:
        shape = self.shape
        return FakeEngine(
            shape.num_blocks,
            shape.block_size,
            weights=weights,
            memory=self._memory.blocks if self._memory is not None else None,
            step_s=shape.step_s,
            fails=self._fails if role == "prefill" and self.profile.engine_fail else None,
        )

    def _fails(self, entry: ScheduledSeq) -> bool:
        """A prefill engine refuses some first attempts at their last chunk."""
        key = entry.seq.key
        if self.is_calm or key.attempt > 1 or not entry.sample:
            return False
        return random.Random(f"{key} {self._seed}").random() < self.profile.engine_fail

    def kill_worker(self, worker_id: str, *, tell_router: bool) -> None:
        """SIGKILL, then a new incarnation after `restart_s`. The supervisor tells the router at once, or not at all."""
        worker = self.workers[worker_id]
        if not worker.is_alive:
            return
        self.faults["kill"] += 1
        self.say(f"{tell(worker.key)} is killed")
        worker.kill()
        self._leave_memory(worker)
        if tell_router:
            self._perform(self.router.worker_lost(worker_id, "killed"))
        self.events.after(self.shape.restart_s, lambda: self.start_worker(worker_id, worker.role))

    def freeze_worker(self, worker_id: str, seconds: float) -> None:
        self.faults["freeze"] += 1
        self.say(f"{worker_id} is frozen for {seconds:.2f} s")
        worker = self.workers[worker_id]
        worker.freeze(seconds)
        if seconds > 1.0:
            for peer, _ in worker.mesh.linked():
                self.events.after(1.0, lambda p=peer: self.network.cut(worker.key, p, seconds))  # type: ignore[misc]

    def hang_worker(self, worker_id: str, seconds: float) -> None:
        """Its engine hangs in a step while its other threads live."""
        self.faults["hang"] += 1
        self.say(f"{worker_id} hangs for {seconds:.2f} s")
        self.workers[worker_id].hang(seconds)

    def drain_worker(self, worker_id: str) -> None:
        """SIGTERM; a new incarnation follows when it has ended."""
        worker = self.workers[worker_id]
        if worker.is_alive:
            self.faults["drain"] += 1
            self.say(f"{tell(worker.key)} drains")
            worker.drain()

    def change_role(self, worker_id: str, role: Role) -> None:
        """Somebody asks for it while requests run; the router refuses what cannot be."""
        self.say(f"{worker_id} is to be for {role}")
        try:
            effects = self.router.set_role(worker_id, role)
        except ServeError:
            self.faults["role refused"] += 1
            return
        self.faults[f"role {role}"] += 1
        self._perform(effects)

    def _on_exit(self, worker: SimWorker) -> None:
        """I15: a drained worker has ended."""
        self.say(f"{tell(worker.key)} has drained and ends")
        if self.profile.is_lossless:
            check_empty(worker, "I15", "when it ends")
        self._leave_memory(worker)
        self.events.after(self.shape.restart_s, lambda: self.start_worker(worker.key.worker_id, worker.role))

    def _leave_memory(self, worker: SimWorker) -> None:
        if self._memory is not None:
            self._memory.leave(worker.key.worker_id)

    def calm(self) -> None:
        """No more faults: what was lost must now be made good."""
        self.is_calm = True
        self.network.calm()
        for wires in self._wires.values():
            for wire in wires:
                wire.is_calm = True
        if self.second is not None:
            self.second.calm()

    # ---- clients ----

    def submit(self, request: GenerateRequest) -> None:
        num_queued = self.router.status().queued_requests
        try:
            effects = self.router.submit(request)
        except ServeError as error:
            self.faults[f"refused {error.code}"] += 1
            return
        self.watch.routing.check_door(num_queued)
        self.journal.accept(request)
        self.watch.accepted(request)
        self._perform(effects)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        record = self.journal.records.get(request_id)
        if record is None or record.end is not None:
            return
        self.journal.cancel(request_id, choice)
        self.say(f"the client cancels {request_id}{'' if choice is None else f' choice {choice}'}")
        self._perform(self.router.cancel(request_id, choice))

    # ---- wires ----

    def _perform(self, effects: list[Effect]) -> None:
        self.watch.router_performs(effects)
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect)
                case Deliver(request_id=request_id, event=event):
                    self.journal.on_tokens(request_id, event)
                case End(request_id=request_id, event=event):
                    self.say(f"{request_id} ends: {event.error or 'well'} ({event.attempts} attempts)")
                    self.journal.on_end(request_id, event)
        if effects:
            self.watch.router_turned(self.router)

    def _send(self, effect: Send) -> None:
        wires = self._wires.get(effect.worker)
        if wires is None:
            return
        data = codec.from_router.encode(effect.message)
        kind = type(effect.message.body).__name__

        def deliver(frame: bytes) -> None:
            self._to_worker(effect.worker, codec.from_router.decode(frame))

        if self._trace is not None:
            self.say(f"router → {tell(effect.worker)}  {tell(effect.message.body)}")
        crossing, tap = Crossing(ROUTER, effect.worker, effect.message.body, self.clock.now()), self.tap
        tap.leaves(crossing, data, lambda frame: wires[0].carry(kind, lambda: tap.arrives(crossing, frame, deliver)))
        if self._has_stranger():
            self.faults["unknown Abort"] += 1
            self._to_worker(effect.worker, strange_command(self.rng, effect.message.router_epoch))

    def _to_worker(self, key: WorkerKey, frame: FromRouter) -> None:
        worker = self.workers.get(key.worker_id)
        if worker is not None and worker.key == key:
            worker.on_frame(frame)

    def _from_worker(self, router: str, key: WorkerKey, frame: FromWorker) -> None:
        if self.second is not None and router == SECOND:
            self.second.hear_later(frame)
        else:
            self._to_router(key, frame)

    def _to_router(self, key: WorkerKey, frame: FromWorker) -> None:
        data = codec.from_worker.encode(frame)
        kind = type(frame.body).__name__
        if kind != "Heartbeat" and self._trace is not None:
            self.say(f"{tell(key)} → router  {tell(frame.body)}")
        crossing, tap, wire = Crossing(key, ROUTER, frame.body, self.clock.now()), self.tap, self._wires[key][1]
        tap.leaves(crossing, data, lambda data: wire.carry(kind, lambda: tap.arrives(crossing, data, self.hear_worker)))
        if self._has_stranger():
            strange = strange_report(self.rng, key)
            self.faults[f"unknown {type(strange.body).__name__}"] += 1
            self.events.after(self.profile.delay_s, lambda: self._hear(strange))

    def _has_stranger(self) -> bool:
        return not self.is_calm and self.profile.unknown > 0 and self.rng.random() < self.profile.unknown

    def hear_worker(self, frame: bytes) -> None:
        """A frame of a worker reaches the router."""
        self._hear(codec.from_worker.decode(frame))

    def _hear(self, frame: FromWorker) -> None:
        self._perform(self.watch.router_hears(self.router, frame))

    def _tick_router(self) -> None:
        due = self.router.next_deadline
        if due is not None and due <= self.clock.now():
            with guarded("I9", "router", "a timer is fatal"):
                effects = self.router.tick()
            self._perform(effects)
        if self.second is not None:
            self.second.tick()
        self._num_ticks += 1
        if self._num_ticks % HEALTH_EVERY == 0:
            self.watch.health.check(self.router)
        self.events.after(ROUTER_TICK_S, self._tick_router, is_awaited=False)

    # ---- invariants ----

    def say(self, line: str) -> None:
        if self._trace is not None:
            self._trace(f"{self.clock.now() - 1000.0:9.4f}  {line}")

    def situation(self) -> list[str]:
        """Where everything stands, for a person."""
        return list(situation(self.router, self.workers.values(), self.journal))

    def _owner_of(self, mesh: InprocMesh) -> SimWorker | None:
        worker = self.workers.get(mesh.key.worker_id)
        return worker if worker is not None and worker.key == mesh.key else None

    def _check_copy(self, source: InprocMesh, target: InprocMesh, push: Push, slot: int, block: int) -> None:
        self.watch.blocks.writes(self._owner_of(source), self._owner_of(target), push, slot, block)

    def _check_gift(self, target: InprocMesh, push: Push, ordinal: int, block: int) -> None:
        assert self._memory is not None
        self._memory.check_gift(target.owner, block)
        self.watch.blocks.stays(self._owner_of(target), push, ordinal, block)

    @property
    def num_open(self) -> int:
        """Requests of all clients that have not ended."""
        return self.journal.num_open + (self.second.journal.num_open if self.second is not None else 0)

    @property
    def is_quiet(self) -> bool:
        """Nothing is on its way, nobody works, and no request is open."""
        return (
            not self.num_open
            and not self.events.num_awaited
            and all(worker.is_quiet for worker in self.workers.values())
        )

    def check_at_rest(self) -> None:
        """After the last request: all is back, no timer finds anything more, and a router that drains refuses."""
        self.watch.check_at_rest(self.router, list(self.workers.values()))
        if self.second is not None:
            self.second.check_at_rest()
        self.clock.advance(LONG_S)
        for worker in [*self.workers.values()] * (2 if self._memory is not None else 1):  # one gives, the other finds
            self.watch.check_timers(worker)
        if self._memory is not None:
            self._memory.check_at_rest()
        self._check_refuses()

    def _check_refuses(self) -> None:
        self._perform(self.router.drain())
        request = GenerateRequest("late", [1], SamplingParams(max_tokens=1), 1.0)
        try:
            self.router.submit(request)
        except Unavailable:
            return
        raise InvariantBroken("I15 router: drains, and takes a new request")
