"""One simulated worker process:

the real `WorkerCore` with both roles' real code, a FakeEngine, heartbeats and a busy loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.block_names import name_key
from ..core.ids import WorkerKey
from ..decode_node.role import DecodeRole
from ..engine.block_pool import BlockPool
from ..engine.interface import ScheduledSeq
from ..engine.kv_memory import KVMemory
from ..engine.parking import ParkingSpace
from ..engine.speculation.control import Speculator
from ..kvtransfer.destination import DestinationTable
from ..kvtransfer.effects import LinkEvent
from ..kvtransfer.source import PushSizes, SourceTable
from ..kvtransfer.transports.inproc import InprocMesh
from ..prefill_node.role import PrefillRole
from ..protocol.messages import MAX_REQUESTS, FromRouter, FromWorker, Goodbye, Heartbeat, Role, ToRouter
from ..worker.core import ROLES_OF, BecomeRole, CoreEffect, SetPeers, WorkerCore
from ..worker.heartbeat import HeartbeatBuilder
from ..worker.process import hello_of
from ..worker.role import Role as RoleCode
from ..worker.role import Tell
from ..worker.routers import RouterGone
from ..worker.turn_watch import MAX_STEP_S, TurnWatch
from ..worker.within_step import Item
from .events import EventQueue
from .fake_engine import FakeEngine
from .invariants import InvariantBroken, broken
from .sim_drafts import SeededProposer
from .sim_memory import MemoryShare
from .sim_network import SimNetwork

HEARTBEAT_S = 0.25
TICK_S = 0.1
CLUSTER_KEY = b"the simulation"

MakeParking = Callable[[KVMemory, BlockPool], ParkingSpace]


@dataclass(frozen=True, slots=True)
class WorkerSizes:
    """Tiny on purpose: bounds that are never reached are never tested."""

    lease_s: float = 2.0
    max_batch_tokens: int = 16
    max_running: int = 4
    max_requests: int = MAX_REQUESTS
    max_early: int = 1024
    early_s: float = 5.0
    max_step_s: float = MAX_STEP_S
    draft_tokens: int = 0  # of a sequence and step
    draft_hits: float = 0.0
    draft_seed: int = 0


class Observer(Protocol):
    """Sees what happens to a worker; see `watch.py`."""

    def arrived(self, worker: SimWorker, frame: FromRouter) -> None: ...

    def hears(self, worker: SimWorker, item: Item) -> list[CoreEffect]: ...

    def heard(self, worker: SimWorker, event: LinkEvent) -> None: ...

    def scheduled(self, worker: SimWorker, entries: Sequence[ScheduledSeq]) -> None: ...

    def performs(self, worker: SimWorker, effect: CoreEffect) -> None: ...

    def beats(self, worker: SimWorker, beat: Heartbeat) -> None: ...

    def turned(self, worker: SimWorker, *, has_ticked: bool, is_changed: bool) -> None: ...


class SimWorker:
    """An incarnation. `to_router` carries its frames to one of those that `find_routers` names; `on_exit` hears when a
    drained worker has ended.

    `share`: its place in the memory of all workers; without, it has one of its own.
    """

    def __init__(
        self,
        key: WorkerKey,
        role: Role,
        engine: FakeEngine,
        events: EventQueue,
        network: SimNetwork,
        to_router: Callable[[str, FromWorker], None],
        find_routers: Callable[[], list[str]],
        observer: Observer,
        on_exit: Callable[[SimWorker], None],
        sizes: WorkerSizes,
        make_parking: MakeParking,
        share: MemoryShare | None = None,
    ) -> None:
        self.key, self.role, self.engine = key, role, engine
        self._events, self._to_router, self._observer, self._on_exit = events, to_router, observer, on_exit
        self._find_routers = find_routers
        self._ownership = share.ownership if share is not None else None
        self.pool = share.pool if share is not None else BlockPool(engine.spec.num_blocks, engine.spec.block_size)
        self.max_early = sizes.max_early
        pushes = PushSizes(engine.spec.fingerprint.num_layers, most=6, least=1 + len(key.epoch.strip("01234567")) % 3)
        self.source = SourceTable(sizes.lease_s, sizes.lease_s, pushes)
        self.destination = DestinationTable(sizes.lease_s, early_s=sizes.early_s, max_early=sizes.max_early)
        self.decode: DecodeRole | None = None
        self.proposer: SeededProposer | None = None
        self._sizes, self._make_parking = sizes, make_parking
        self.core = WorkerCore(
            key,
            role,
            engine,
            self.pool,
            [self._host(name) for name in ROLES_OF[role]],
            events.clock,
            max_batch_tokens=sizes.max_batch_tokens,
            block_secret=name_key(CLUSTER_KEY),
            make_role=self._host,
        )
        self.mesh = InprocMesh(key, role, engine.spec.fingerprint, engine.memory, self._on_link, network)
        if share is not None:
            self.mesh.ledger, self.mesh.owner = share.ledger, share.number
        self._network = network
        self._turns = TurnWatch(events.clock, sizes.max_step_s)
        self._heartbeats: dict[str, HeartbeatBuilder] = {}  # by router
        self._inbox: deque[Item] = deque()
        self._failure: Exception | None = None  # within a step
        self._router_epochs: dict[str, str] = {}
        self._is_busy = self._is_draining = False
        self._turned_at = events.clock.now()
        self._frozen_until = self._hung_until = 0.0
        self.is_alive = True
        events.after(0.0, self._beat, is_awaited=False)
        events.after(TICK_S, self._tick, is_awaited=False)
        self._renew_s = sizes.lease_s / 3
        events.after(self._renew_s, self._renew, is_awaited=False)

    def _host(self, name: Role) -> RoleCode:
        """The code of one role, at the start or when the worker is given it."""
        key, spec, pool, sizes = self.key, self.engine.spec, self.pool, self._sizes
        if name == "prefill":
            bound, owner = sizes.max_requests, self._ownership
            return PrefillRole(key, spec, pool, self.source, CLUSTER_KEY, bound, ownership=owner)
        bounds, parking = (sizes.max_running, sizes.max_requests), self._make_parking(self.engine.memory, pool)
        self.decode = DecodeRole(
            key,
            spec,
            pool,
            self.destination,
            CLUSTER_KEY,
            *bounds,
            parking=parking,
            ownership=self._ownership,
            speculation=self._speculation(sizes),
        )
        return self.decode

    def hosts(self, name: Role) -> bool:
        """It has the code of this role, whatever it is for now."""
        return any(role.hands_off is (name == "prefill") for role in self.core.roles)

    def _speculation(self, sizes: WorkerSizes) -> Speculator | None:
        if not sizes.draft_tokens:
            return None
        self.proposer = SeededProposer(sizes.draft_hits, sizes.draft_seed)
        return Speculator([self.proposer], sizes.draft_tokens, None)

    # ---- the process's threads ----

    def on_frame(self, frame: FromRouter) -> None:
        """A command reaches the I/O thread."""
        if not self.is_alive or not self._heartbeat(frame.router).on_frame(frame):
            return
        if frame.router_epoch != self._router_epochs.get(frame.router):
            self._router_epochs[frame.router] = frame.router_epoch
            self._say(hello_of(self.core, self.mesh), frame.router)
        self._observer.arrived(self, frame)
        self._inbox.append(frame)
        self._turn()

    def _on_link(self, event: LinkEvent) -> None:
        self._inbox.append(event)
        self._turn()

    def _beat(self) -> None:
        if not self.is_alive:
            return
        if not self._is_silent:
            for router in self._find_routers():
                self._speak(router)
        self._events.after(HEARTBEAT_S, self._beat, is_awaited=False)

    def _speak(self, router: str) -> None:
        if router not in self._router_epochs:
            self._say(hello_of(self.core, self.mesh), router)
            return
        beat = self._heartbeat(router).build(self.core.snapshot(), self.mesh.linked())
        self._observer.beats(self, beat)
        self._say(beat, router)

    def _heartbeat(self, router: str) -> HeartbeatBuilder:
        if router not in self._heartbeats:
            self._heartbeats[router] = HeartbeatBuilder(self._turns, router)
        return self._heartbeats[router]

    def on_router_gone(self, router: str) -> None:
        """The I/O thread has had no connection to this router for a while."""
        if self.is_alive and self._router_epochs.pop(router, None) is not None:
            self._inbox.append(RouterGone(router))
            self._turn()

    def _tick(self) -> None:
        if not self.is_alive:
            return
        if self._inbox or self._is_draining or not self.is_quiet:
            self._turn()
        else:
            self._note_turn()  # there is nothing that a timer could end
        self._events.after(TICK_S, self._tick, is_awaited=False)

    def _renew(self) -> None:
        """The links' own threads: they go on while a step computes."""
        if not self.is_alive:
            return
        if not self._is_silent and not self._turns.is_stalled():
            self.mesh.renew()
        self._events.after(self._renew_s, self._renew, is_awaited=False)

    # ---- what may happen to it ----

    def freeze(self, seconds: float) -> None:
        """SIGSTOP for a while: nothing is handled, nothing is said."""
        self._frozen_until = self._events.clock.now() + seconds
        self._events.after(seconds, self._turn)

    def hang(self, seconds: float) -> None:
        """The engine hangs: its step, or the next turn of the loop, lasts so long, while the heartbeats go on."""
        self._hung_until = self._events.clock.now() + seconds
        self._events.after(seconds, self._turn)

    def drain(self) -> None:
        """SIGTERM: take nothing new, finish, say goodbye, end."""
        self._is_draining = True
        self.core.drain()
        self._turn()

    def kill(self) -> None:
        """SIGKILL: the process is gone between two events; its sockets close."""
        self.is_alive = False
        self._network.kill(self.key)

    @property
    def _is_frozen(self) -> bool:
        """The loop does not go on."""
        return self._events.clock.now() < max(self._frozen_until, self._hung_until)

    @property
    def _is_silent(self) -> bool:
        """The whole process stands still."""
        return self._events.clock.now() < self._frozen_until

    @property
    def turn_age_s(self) -> float:
        """Since the loop began its last turn."""
        return self._events.clock.now() - self._turned_at

    def _note_turn(self) -> None:
        self._turned_at = self._events.clock.now()
        self._turns.turn()

    @property
    def is_quiet(self) -> bool:
        """It does nothing, holds nothing and waits for nothing."""
        return not (
            self._inbox
            or self._is_busy
            or self._is_frozen
            or not self.core.is_idle
            or self.core.has_work()
            or self.source.active()
            or self.destination.active()
            or self.destination.num_early
        )

    # ---- the loop ----

    def _turn(self) -> None:
        if self._is_busy or not self.is_alive or self._is_frozen:
            return
        self._note_turn()
        is_changed = bool(self._inbox)
        while self._inbox:
            self._perform(self._observer.hears(self, self._inbox.popleft()))
        try:
            timed_out = self.core.tick()
            self._perform(timed_out)
            batch, effects = self.core.begin_step()
        except Exception as error:
            raise broken("I9", self.key, "a timer or the scheduler is fatal", error) from error
        self._observer.scheduled(self, [entry for _, entry in batch])
        self._perform(effects)
        is_changed = is_changed or bool(timed_out or effects or batch)
        self._observer.turned(self, has_ticked=True, is_changed=is_changed)
        if batch:
            self._is_busy = True
            self._events.after(self.engine.cost_s([e for _, e in batch]), lambda: self._finish(batch))
        elif self._is_draining and self.core.is_idle:
            self._exit()

    def _finish(self, batch: list[tuple[RoleCode, ScheduledSeq]]) -> None:
        if not self.is_alive:
            return
        if self._is_frozen:
            self._events.after(TICK_S, lambda: self._finish(batch))
            return
        self._is_busy = False
        try:
            results = self.core.compute(batch, lambda layers: self._on_layers(batch, layers))
            if self._failure is not None:
                raise self._failure
            effects = self.core.end_step(batch, results)
        except InvariantBroken:
            raise
        except Exception as error:
            raise broken("I9", self.key, "a step is fatal", error) from error
        self._perform(effects)
        self._observer.turned(self, has_ticked=False, is_changed=True)
        self._turn()

    def _on_layers(self, batch: list[tuple[RoleCode, ScheduledSeq]], num_layers: int) -> None:
        try:
            self._go_on_within(batch, num_layers)
        except Exception as error:
            self._failure = self._failure or error  # the core takes it for the engine's and goes on
            raise

    def _go_on_within(self, batch: list[tuple[RoleCode, ScheduledSeq]], num_layers: int) -> None:
        tables = [(entry.seq.key, list(entry.seq.block_table)) for _, entry in batch]
        for item in self.core.take_within_step(batch, self._inbox):
            self._perform(self._observer.hears(self, item))
            if tables != [(entry.seq.key, entry.seq.block_table) for _, entry in batch]:
                raise InvariantBroken(f"I4 {self.key}: {item} changed the blocks of the batch within its step")
        self._perform(self.core.layers_computed(batch, num_layers))

    def _exit(self) -> None:
        for router in self._find_routers():
            self._say(Goodbye(), router)
        self.is_alive = False
        self.mesh.close()
        self._on_exit(self)

    def _perform(self, effects: list[CoreEffect]) -> None:
        for effect in effects:
            self._observer.performs(self, effect)
            match effect:
                case Tell(message=message, router=router):
                    self._say(message, router)
                case SetPeers(peers=peers):
                    self.mesh.set_peers(list(peers))
                case BecomeRole(role=role):
                    self.mesh.set_role(role)
                case _:
                    self.mesh.perform(effect)

    def _say(self, message: ToRouter, router: str) -> None:
        self._to_router(router, FromWorker(*self.key, message))
