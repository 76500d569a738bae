"""A whole cluster on virtual time: the real router core, the real worker cores, simulated wires, faults from a seed.

    clients ─submit→ RouterCore ─frames over Wire→ SimWorker(WorkerCore, FakeEngine) ─SimMesh→ SimWorker
After every event the invariants of the worker or router that handled it are checked.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ..core.errors import ServeError
from ..core.ids import BlockId, SeededIds, Ticket, WorkerKey, new_epoch
from ..engine.block_pool import BlockPool
from ..engine.interface import ScheduledSeq
from ..engine.kv_memory import KVMemory
from ..kvtransfer.transports.inproc import InprocMesh
from ..protocol import codec
from ..protocol.messages import FromWorker, Push, Role
from ..router.config import RouterConfig
from ..router.core import RouterCore
from ..router.effects import Deliver, Effect, End, Send
from ..router.interface import GenerateRequest
from .chaos import ChaosProfile, Wire
from .clock import FakeClock
from .events import EventQueue
from .fake_engine import FakeEngine
from .journal import InvariantBroken, Journal
from .sim_network import SimNetwork
from .sim_parking import SimParking
from .sim_worker import CLUSTER_KEY, SimWorker
from .tap import ROUTER, Crossing, Tap

ROUTER_TICK_S = 0.1


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """Sizes of a simulated cluster. Pools are tiny on purpose: that is where block bugs live."""

    num_prefill: int = 1
    num_decode: int = 1
    num_both: int = 0
    num_blocks: int = 24
    block_size: int = 4
    max_batch_tokens: int = 16
    max_running: int = 4
    park_blocks: int = 0  # host memory of each decode worker
    park_copy_s: float = 0.0  # what copying a sequence seems to take
    lease_s: float = 2.0
    restart_s: float = 0.5
    max_step_s: float = 60.0
    router: RouterConfig = field(default_factory=RouterConfig)


class SimCluster:
    """One run. Everything random comes from `rng`; `trace` hears of every message."""

    def __init__(
        self, shape: ClusterShape, profile: ChaosProfile, seed: int, trace: Callable[[str], None] | None = None
    ) -> None:
        self.shape, self.profile = shape, profile
        self._seed = seed
        self.rng, self._ids = random.Random(seed), SeededIds(seed)
        self._park_rng = random.Random(f"parking {seed}")
        self.clock = FakeClock()
        self.events = EventQueue(self.clock)
        self.faults: Counter[str] = Counter()
        self.journal = Journal()
        self.network = SimNetwork(self.events, profile, self.rng, self.faults)
        self.network.check_copy, self.network.trace = self._check_copy, self.say
        self.tap = Tap()
        self._trace = trace
        self.router = RouterCore(shape.router, self.clock, self._ids, CLUSTER_KEY)
        self.workers: dict[str, SimWorker] = {}
        self._wires: dict[WorkerKey, tuple[Wire, Wire]] = {}
        self.is_calm = False
        roles: list[tuple[str, Role, int]] = [
            ("prefill", "prefill", shape.num_prefill),
            ("decode", "decode", shape.num_decode),
            ("both", "both", shape.num_both),
        ]
        for name, role, number in roles:
            for i in range(number):
                self.start_worker(f"{name}-{i}", role)
        self.events.after(ROUTER_TICK_S, self._tick_router)

    # ---- workers ----

    def start_worker(self, worker_id: str, role: Role) -> None:
        key = WorkerKey(worker_id, new_epoch(self._ids))
        shape = self.shape
        down, up = (Wire(self.events, self.profile, self.rng, self.faults) for _ in range(2))
        down.is_calm = up.is_calm = self.is_calm
        self._wires[key] = (down, up)
        self.workers[worker_id] = SimWorker(
            key,
            role,
            self.make_engine(role),
            self.events,
            self.network,
            lambda frame: self._to_router(key, frame),
            self._check_worker,
            lease_s=shape.lease_s,
            max_batch_tokens=shape.max_batch_tokens,
            max_running=shape.max_running,
            max_step_s=shape.max_step_s,
            make_parking=self._make_parking,
        )
        self.say(f"{key} starts")

    def _make_parking(self, memory: KVMemory, pool: BlockPool) -> SimParking:
        shape = self.shape
        return SimParking(memory, pool, shape.park_blocks, shape.park_copy_s, self.faults, self._spoils_parked)

    def _spoils_parked(self) -> bool:
        return not self.is_calm and self._park_rng.random() < self.profile.corrupt_parked

    def make_engine(self, role: Role) -> FakeEngine:
        shape = self.shape
        return FakeEngine(shape.num_blocks, shape.block_size, fails=self._fails if role == "prefill" else None)

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
        self.say(f"{worker.key} is killed")
        worker.kill()
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

    def calm(self) -> None:
        """No more faults: what was lost must now be made good."""
        self.is_calm = True
        self.network.calm()
        for wires in self._wires.values():
            for wire in wires:
                wire.is_calm = True

    # ---- clients ----

    def submit(self, request: GenerateRequest) -> None:
        try:
            effects = self.router.submit(request)
        except ServeError as error:
            self.faults[f"refused {error.code}"] += 1
            return
        self.journal.accept(request)
        self._perform(effects)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        record = self.journal.records.get(request_id)
        if record is None or record.end is not None:
            return
        if choice is None:
            record.is_cancelled = True
        else:
            record.cancelled_choices.add(choice)
        self._perform(self.router.cancel(request_id, choice))

    # ---- wires ----

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect)
                case Deliver(request_id=request_id, event=event):
                    self.journal.on_tokens(request_id, event)
                case End(request_id=request_id, event=event):
                    self.say(f"{request_id} ends: {event}")
                    self.journal.on_end(request_id, event)
        self._check_router()

    def _send(self, effect: Send) -> None:
        wires = self._wires.get(effect.worker)
        if wires is None:
            return
        data = codec.from_router.encode(effect.message)
        kind = type(effect.message.body).__name__
        self.say(f"router → {effect.worker}: {effect.message.body}")

        def deliver(frame: bytes) -> None:
            worker = self.workers.get(effect.worker.worker_id)
            if worker is not None and worker.key == effect.worker:
                worker.on_frame(codec.from_router.decode(frame))

        crossing, tap = Crossing(ROUTER, effect.worker, effect.message.body, self.clock.now()), self.tap
        tap.leaves(crossing, data, lambda frame: wires[0].carry(kind, lambda: tap.arrives(crossing, frame, deliver)))

    def _to_router(self, key: WorkerKey, frame: FromWorker) -> None:
        data = codec.from_worker.encode(frame)
        kind = type(frame.body).__name__
        if kind != "Heartbeat":
            self.say(f"{key} → router: {frame.body}")
        crossing, tap, wire = Crossing(key, ROUTER, frame.body, self.clock.now()), self.tap, self._wires[key][1]
        tap.leaves(crossing, data, lambda data: wire.carry(kind, lambda: tap.arrives(crossing, data, self.hear_worker)))

    def hear_worker(self, frame: bytes) -> None:
        """A frame of a worker reaches the router."""
        self._perform(self.router.on_message(codec.from_worker.decode(frame)))

    def _tick_router(self) -> None:
        self._perform(self.router.tick())
        self.events.after(ROUTER_TICK_S, self._tick_router)

    # ---- invariants ----

    def say(self, line: str) -> None:
        if self._trace is not None:
            self._trace(f"{self.clock.now() - 1000.0:9.4f}  {line}")

    def _check_worker(self, worker: SimWorker) -> None:
        """I4 block conservation, and the tables' own rules."""
        try:
            worker.core.check_invariants()
            worker.source.check_invariants()
            worker.destination.check_invariants()
            if worker.decode is not None:
                worker.decode.check_invariants()
        except InvariantBroken:
            raise
        except AssertionError as error:
            raise InvariantBroken(f"I4 {worker.key}: {error}") from error
        silent = self.network.silent_ends(worker.key, worker.source.active())
        if silent:
            raise InvariantBroken(f"I8 {worker.key}: gave up hand-off {silent[0].hex()[:8]} and told nobody")

    def _check_router(self) -> None:
        """I11 bounded queues, and the router's own rules."""
        self.router.check_invariants()
        status = self.router.status()
        config = self.shape.router
        if status.queued_requests > config.max_queued_requests or status.active_requests > config.max_active_requests:
            raise InvariantBroken(
                f"I11 router holds {status.active_requests} requests, {status.queued_requests} queued"
            )

    def _owner_of(self, mesh: InprocMesh) -> SimWorker | None:
        worker = self.workers.get(mesh.key.worker_id)
        return worker if worker is not None and worker.key == mesh.key else None

    def _check_copy(self, source: InprocMesh, target: InprocMesh, push: Push, slot: int, block: int) -> None:
        """I5:

        a write goes only to a block that a live hand-off owns, and while one lives its source keeps the blocks.
        """
        reader, writer, ticket = self._owner_of(source), self._owner_of(target), Ticket(push.ticket)
        if writer is not None:
            is_owned = writer.pool.ref_count(BlockId(block)) == 1 and ticket in writer.destination.active()
            if not is_owned:
                raise InvariantBroken(f"I5 {writer.key}: write into block {block} that its hand-off does not own")
        if reader is not None and ticket in reader.source.active() and reader.pool.ref_count(BlockId(slot)) < 1:
            raise InvariantBroken(f"I5 {reader.key}: block {slot} was freed before its hand-off ended")

    def check_at_rest(self) -> None:
        """After the last request: every request ended (I1), every block is back (I4, I8), nothing is in the tables."""
        self.journal.check_finished()
        for worker in self.workers.values():
            load = worker.core.snapshot().load
            if load.free_blocks != load.total_blocks:
                raise InvariantBroken(
                    f"I8 {worker.key}: {load.total_blocks - load.free_blocks} blocks are still held at rest"
                )
            if load.parked_bytes:
                raise InvariantBroken(f"I8 {worker.key}: {load.parked_bytes} bytes are still parked at rest")
            if worker.source.active() or worker.destination.active():
                raise InvariantBroken(f"I8 {worker.key}: hand-offs are still open at rest")
