"""One simulated worker process:

the real `WorkerCore` with both roles' real code, a FakeEngine, heartbeats and a busy loop.
"""

from __future__ import annotations

from collections.abc import Callable

from ..core.ids import WorkerKey
from ..decode_node.role import DecodeRole
from ..engine.block_pool import BlockPool
from ..engine.interface import ScheduledSeq
from ..engine.kv_memory import KVMemory
from ..engine.parking import ParkingSpace
from ..kvtransfer.destination import DestinationTable
from ..kvtransfer.effects import LinkEvent, MessageArrived
from ..kvtransfer.source import PushSizes, SourceTable
from ..kvtransfer.transports.inproc import InprocMesh
from ..prefill_node.role import PrefillRole
from ..protocol.messages import FromRouter, FromWorker, Grant, Role, ToRouter
from ..worker.core import CoreEffect, SetPeers, WorkerCore
from ..worker.heartbeat import HeartbeatBuilder
from ..worker.process import hello_of
from ..worker.role import Role as RoleCode
from ..worker.role import Tell
from ..worker.turn_watch import MAX_STEP_S, TurnWatch
from .events import EventQueue
from .fake_engine import FakeEngine
from .sim_network import SimNetwork

HEARTBEAT_S = 0.25
TICK_S = 0.1
CLUSTER_KEY = b"the simulation"

MakeParking = Callable[[KVMemory, BlockPool], ParkingSpace]


class SimWorker:
    """An incarnation. `to_router` carries its frames; `after_event` runs when the core has handled something."""

    def __init__(
        self,
        key: WorkerKey,
        role: Role,
        engine: FakeEngine,
        events: EventQueue,
        network: SimNetwork,
        to_router: Callable[[FromWorker], None],
        after_event: Callable[[SimWorker], None],
        *,
        lease_s: float,
        max_batch_tokens: int,
        max_running: int,
        max_step_s: float = MAX_STEP_S,
        make_parking: MakeParking | None = None,
    ) -> None:
        self.key, self.role, self.engine = key, role, engine
        self._events, self._to_router, self._after_event = events, to_router, after_event
        self.pool = BlockPool(engine.spec.num_blocks, engine.spec.block_size)
        sizes = PushSizes(engine.spec.fingerprint.num_layers, most=6, least=1 + len(key.epoch.strip("01234567")) % 3)
        self.source, self.destination = SourceTable(lease_s, lease_s, sizes), DestinationTable(lease_s)
        self.decode: DecodeRole | None = None
        roles: list[RoleCode] = []
        if role != "prefill":
            parking = make_parking(engine.memory, self.pool) if make_parking is not None else None
            self.decode = DecodeRole(
                key, engine.spec, self.pool, self.destination, CLUSTER_KEY, max_running, parking=parking
            )
            roles.append(self.decode)
        if role != "decode":
            roles.append(PrefillRole(key, engine.spec, self.pool, self.source, CLUSTER_KEY))
        self.core = WorkerCore(key, role, engine, self.pool, roles, events.clock, max_batch_tokens=max_batch_tokens)
        self.mesh = InprocMesh(key, role, engine.spec.fingerprint, engine.memory, self._on_link, network)
        self._network = network
        self._turns = TurnWatch(events.clock, max_step_s)
        self._heartbeat = HeartbeatBuilder(self._turns)
        self._inbox: list[FromRouter | LinkEvent] = []
        self._router_epoch: str | None = None
        self._is_busy = False
        self._frozen_until = self._hung_until = 0.0
        self.is_alive = True
        events.after(0.0, self._beat)
        events.after(TICK_S, self._tick)
        self._renew_s = lease_s / 3
        events.after(self._renew_s, self._renew)

    # ---- the process's threads ----

    def on_frame(self, frame: FromRouter) -> None:
        """A command reaches the I/O thread."""
        if not self.is_alive:
            return
        if frame.router_epoch != self._router_epoch:
            self._router_epoch = frame.router_epoch
            self._say(hello_of(self.core, self.mesh))
        self._heartbeat.on_frame(frame)
        self._inbox.append(frame)
        self._turn()

    def _on_link(self, event: LinkEvent) -> None:
        self._inbox.append(event)
        self._turn()

    def _beat(self) -> None:
        if not self.is_alive:
            return
        if not self._is_silent:
            has_router = self._router_epoch is not None
            snapshot = self.core.snapshot() if has_router else None
            self._say(
                self._heartbeat.build(snapshot, self.mesh.linked()) if has_router else hello_of(self.core, self.mesh)
            )
        self._events.after(HEARTBEAT_S, self._beat)

    def _tick(self) -> None:
        if not self.is_alive:
            return
        self._turn()
        self._events.after(TICK_S, self._tick)

    def _renew(self) -> None:
        """The links' own threads: they go on while a step computes."""
        if not self.is_alive:
            return
        if not self._is_silent and not self._turns.is_stalled():
            self.mesh.renew()
        self._events.after(self._renew_s, self._renew)

    def freeze(self, seconds: float) -> None:
        """SIGSTOP for a while: nothing is handled, nothing is said."""
        self._frozen_until = self._events.clock.now() + seconds
        self._events.after(seconds, self._turn)

    def hang(self, seconds: float) -> None:
        """The engine hangs: its step, or the next turn of the loop, lasts so long, while the heartbeats go on."""
        self._hung_until = self._events.clock.now() + seconds
        self._events.after(seconds, self._turn)

    @property
    def _is_frozen(self) -> bool:
        """The loop does not go on."""
        return self._events.clock.now() < max(self._frozen_until, self._hung_until)

    @property
    def _is_silent(self) -> bool:
        """The whole process stands still."""
        return self._events.clock.now() < self._frozen_until

    def kill(self) -> None:
        """SIGKILL: the process is gone between two events; its sockets close."""
        self.is_alive = False
        self._network.kill(self.key)

    # ---- the loop ----

    def _turn(self) -> None:
        if self._is_busy or not self.is_alive or self._is_frozen:
            return
        self._turns.turn()
        while self._inbox:
            item = self._inbox.pop(0)
            self._perform(self.core.on_frame(item) if isinstance(item, FromRouter) else self.core.on_link(item))
        self._perform(self.core.tick())
        batch, effects = self.core.begin_step()
        self._perform(effects)
        self._after_event(self)
        if batch:
            self._is_busy = True
            self._events.after(self.engine.cost_s([e for _, e in batch]), lambda: self._finish(batch))

    def _finish(self, batch: list[tuple[RoleCode, ScheduledSeq]]) -> None:
        if not self.is_alive:
            return
        if self._is_frozen:
            self._events.after(TICK_S, lambda: self._finish(batch))
            return
        self._is_busy = False
        self._perform(
            self.core.end_step(batch, self.core.compute(batch, lambda layers: self._on_layers(batch, layers)))
        )
        self._after_event(self)
        self._turn()

    def _on_layers(self, batch: list[tuple[RoleCode, ScheduledSeq]], num_layers: int) -> None:
        grants = [item for item in self._inbox if isinstance(item, MessageArrived) and isinstance(item.message, Grant)]
        for item in grants:
            self._inbox.remove(item)
            self._perform(self.core.on_grant(item))
        self._perform(self.core.layers_computed(batch, num_layers))

    def _perform(self, effects: list[CoreEffect]) -> None:
        for effect in effects:
            match effect:
                case Tell(message=message):
                    self._say(message)
                case SetPeers(peers=peers):
                    self.mesh.set_peers(list(peers))
                case _:
                    self.mesh.perform(effect)

    def _say(self, message: ToRouter) -> None:
        self._to_router(FromWorker(*self.key, message))
