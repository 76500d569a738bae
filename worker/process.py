"""The worker process: three kinds of threads around one `WorkerCore`.

main thread   the loop: drain the inbox → schedule → compute → commit → carry effects out; alone touches the core
I/O thread    the socket to the router: commands in, messages out, heartbeats whatever the loop does
link threads  one pair for each peer, inside the mesh: hand-off messages, block bytes, liveness

commands ─▶ inbox ─▶ loop ─▶ outbox ─▶ router          link events ─▶ inbox ─▶ loop ─▶ mesh
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..core.clock import Clock, MonotonicClock
from ..core.errors import InternalError, ProtocolError
from ..core.ids import WorkerKey
from ..engine.interface import Engine, ScheduledSeq
from ..kvtransfer.effects import LinkEvent
from ..kvtransfer.link import Mesh
from ..protocol import codec
from ..protocol.messages import FromRouter, FromWorker, Goodbye, Hello, Role, ToRouter
from ..protocol.sockets import WorkerSocket
from .core import BecomeRole, CoreEffect, SetPeers, Snapshot, WorkerCore
from .fault_signal import obey_fault_signals
from .heartbeat import HeartbeatBuilder
from .role import Role as RoleCode
from .role import Tell
from .turn_watch import TurnWatch

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.1
TICK_S = 0.05
Inbox = queue.SimpleQueue[FromRouter | LinkEvent | None]


@dataclass(frozen=True, slots=True)
class Incarnation:
    """Who this process is to the router."""

    key: WorkerKey
    role: Role
    router_address: str
    drain_s: float = 60.0
    heartbeat_s: float = HEARTBEAT_S


class RouterLink:
    """The I/O thread: owns the socket to the router."""

    def __init__(
        self, who: Incarnation, hello: Hello, inbox: Inbox, mesh: Mesh, clock: Clock, turns: TurnWatch
    ) -> None:
        self._who, self._hello, self._inbox, self._mesh, self._clock = who, hello, inbox, mesh, clock
        self._heartbeat = HeartbeatBuilder(turns)
        self._socket = WorkerSocket(who.router_address, str(who.key))
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._router_epoch: str | None = None
        self.snapshot: Snapshot | None = None  # replaced as a whole by the loop
        self.is_broken = False
        self._thread = threading.Thread(target=self._run, name="router-io", daemon=True)
        self._thread.start()

    def tell(self, message: ToRouter) -> None:
        """Queue a message for the router; any thread."""
        self._outbox.put(codec.from_worker.encode(FromWorker(*self._who.key, message)))
        self._socket.wake()

    def close(self) -> None:
        """Send what is queued, then end the thread."""
        self._stop.set()
        self._socket.wake()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        next_beat = self._clock.now()
        try:
            while not self._stop.is_set():
                now = self._clock.now()
                if now >= next_beat:
                    self._beat()
                    next_beat = now + self._who.heartbeat_s
                self._socket.poll(max(0.0, next_beat - now))
                self._receive()
                self._flush()
            self._flush()
        except Exception:
            log.exception("the connection to the router broke")
            self.is_broken = True
            self._inbox.put(None)
        finally:
            self._socket.close()

    def _beat(self) -> None:
        if self._router_epoch is None:
            self._send(self._hello)
        else:
            self._send(self._heartbeat.build(self.snapshot, self._mesh.linked()))

    def _send(self, message: ToRouter) -> None:
        self._socket.send(codec.from_worker.encode(FromWorker(*self._who.key, message)))

    def _flush(self) -> None:
        while not self._outbox.empty():
            self._socket.send(self._outbox.get_nowait())

    def _receive(self) -> None:
        while (data := self._socket.recv()) is not None:
            try:
                frame = codec.from_router.decode(data)
            except ProtocolError as error:
                log.warning("a frame from the router is dropped: %s", error)
                continue
            if frame.router_epoch != self._router_epoch:
                self._router_epoch = frame.router_epoch
                self._send(self._hello)
            self._heartbeat.on_frame(frame)
            self._inbox.put(frame)


class WorkerLoop:
    """The main thread's loop."""

    def __init__(
        self,
        core: WorkerCore,
        mesh: Mesh,
        router: RouterLink,
        inbox: Inbox,
        clock: Clock,
        turns: TurnWatch,
        drain_s: float,
    ) -> None:
        self._core, self._mesh, self._router, self._inbox, self._clock = core, mesh, router, inbox, clock
        self._turns, self._drain_s = turns, drain_s
        self._next_tick = clock.now()
        self._drain_until: float | None = None
        self._deferred: deque[FromRouter | LinkEvent] = deque()  # came within a step, and has to wait for its end

    def drain(self) -> None:
        """Take nothing new and end when all is done, or after `drain_s`. Safe to call from a signal handler."""
        self._core.drain()
        self._drain_until = self._clock.now() + self._drain_s
        self._inbox.put(None)

    def run(self) -> None:
        progressed = False
        while not self._is_over():
            if self._router.is_broken:
                raise InternalError("the thread that talks to the router has ended; the log has the cause")
            self._turns.turn()
            self._take_inbox(wait=not progressed)
            self._tick()
            progressed = self._step()
            self._router.snapshot = self._core.snapshot()

    def _is_over(self) -> bool:
        if self._drain_until is None:
            return False
        return self._core.is_idle or self._clock.now() > self._drain_until

    def _take_inbox(self, *, wait: bool) -> None:
        wait = wait and not self._deferred
        while self._deferred:
            self._on_item(self._deferred.popleft())
        try:
            item = self._inbox.get(timeout=TICK_S) if wait else self._inbox.get_nowait()
            while True:
                self._on_item(item)
                item = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _on_item(self, item: FromRouter | LinkEvent | None) -> None:
        if isinstance(item, FromRouter):
            self._perform(self._core.on_frame(item))
        elif item is not None:
            self._perform(self._core.on_link(item))

    def _tick(self) -> None:
        now = self._clock.now()
        if now >= self._next_tick:
            self._next_tick = now + TICK_S
            self._perform(self._core.tick())

    def _step(self) -> bool:
        batch, effects = self._core.begin_step()
        self._perform(effects)
        if not batch:
            self._core.engine.rest()
            return False
        results = self._core.compute(batch, lambda num_layers: self._on_layers(batch, num_layers))
        self._perform(self._core.end_step(batch, results))
        return True

    def _on_layers(self, batch: list[tuple[RoleCode, ScheduledSeq]], num_layers: int) -> None:
        """Within a step: what is computed and granted leaves while the next layer is computed, and hand-offs go on."""
        while not self._inbox.empty():
            item = self._inbox.get_nowait()
            if item is not None:
                self._deferred.append(item)
        log.debug("%d layers computed", num_layers)
        for item in self._core.take_within_step(batch, self._deferred):
            self._on_item(item)
        self._perform(self._core.layers_computed(batch, num_layers))

    def _perform(self, effects: list[CoreEffect]) -> None:
        for effect in effects:
            match effect:
                case Tell(message=message):
                    self._router.tell(message)
                case SetPeers(peers=peers):
                    self._mesh.set_peers(list(peers))
                case BecomeRole(role=role):
                    self._mesh.set_role(role)
                case _:
                    self._mesh.perform(effect)


def hello_of(core: WorkerCore, mesh: Mesh) -> Hello:
    spec = core.engine.spec
    return Hello(
        role=core.role_name,
        pid=os.getpid(),
        fingerprint=spec.fingerprint,
        total_blocks=spec.num_blocks,
        max_sequence_tokens=spec.max_sequence_tokens,
        bytes_per_token=spec.bytes_per_token,
        kv_address=mesh.address,
        transports=mesh.transports,
        max_requests=min(role.max_requests for role in core.roles),
    )


MakeMesh = Callable[[Engine, Callable[[LinkEvent], None]], Mesh]
MakeCore = Callable[[Engine, Clock], WorkerCore]


def run_worker(who: Incarnation, engine: Engine, make_core: MakeCore, make_mesh: MakeMesh, turns: TurnWatch) -> int:
    """Serve until SIGTERM (drain, then 0). Ctrl-C is the supervisor's business, not ours."""
    clock = MonotonicClock()
    inbox: Inbox = queue.SimpleQueue()
    core = make_core(engine, clock)
    mesh = make_mesh(engine, inbox.put)
    router = RouterLink(who, hello_of(core, mesh), inbox, mesh, clock, turns)
    loop = WorkerLoop(core, mesh, router, inbox, clock, turns, who.drain_s)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: loop.drain())
    obey_fault_signals(mesh, core, os.environ)
    try:
        loop.run()
    finally:
        router.tell(Goodbye())
        router.close()
        mesh.close()
        engine.memory.close()
    return 0
