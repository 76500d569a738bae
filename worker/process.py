"""The worker process: three kinds of threads around one `WorkerCore`.

main thread   the loop: drain the inbox → schedule → compute → commit → carry effects out; alone touches the core
I/O threads   one for each router, with the socket to it: commands in, messages out, heartbeats whatever the loop does
link threads  one pair for each peer, inside the mesh: hand-off messages, block bytes, liveness

commands ─▶ inbox ─▶ loop ─▶ outbox ─▶ router          link events ─▶ inbox ─▶ loop ─▶ mesh
"""

from __future__ import annotations

import logging
import os
import queue
import signal
from collections import deque
from collections.abc import Callable

from ..core.clock import Clock, MonotonicClock
from ..core.errors import InternalError
from ..engine.interface import Engine, ScheduledSeq
from ..kvtransfer.effects import LinkEvent
from ..kvtransfer.link import Mesh
from ..protocol.messages import FromRouter, Hello
from .core import BecomeRole, CoreEffect, SetPeers, WorkerCore
from .fault_signal import obey_fault_signals
from .role import Role as RoleCode
from .role import Tell
from .router_links import Inbox, Incarnation, RouterLinks
from .routers import RouterGone
from .turn_watch import TurnWatch
from .within_step import Item

log = logging.getLogger(__name__)

TICK_S = 0.05


class WorkerLoop:
    """The main thread's loop."""

    def __init__(
        self,
        core: WorkerCore,
        mesh: Mesh,
        routers: RouterLinks,
        inbox: Inbox,
        clock: Clock,
        turns: TurnWatch,
        drain_s: float,
    ) -> None:
        self._core, self._mesh, self._routers, self._inbox, self._clock = core, mesh, routers, inbox, clock
        self._turns, self._drain_s = turns, drain_s
        self._next_tick = clock.now()
        self._drain_until: float | None = None
        self._deferred: deque[Item] = deque()  # came within a step, and has to wait for its end

    def drain(self) -> None:
        """Take nothing new and end when all is done, or after `drain_s`. Safe to call from a signal handler."""
        self._core.drain()
        self._drain_until = self._clock.now() + self._drain_s
        self._inbox.put(None)

    def run(self) -> None:
        progressed = False
        while not self._is_over():
            if self._routers.is_broken:
                raise InternalError("a thread that talks to a router has ended; the log has the cause")
            self._turns.turn()
            self._routers.look()
            self._take_inbox(wait=not progressed)
            self._tick()
            progressed = self._step()
            self._routers.show(self._core.snapshot())

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

    def _on_item(self, item: Item | None) -> None:
        if isinstance(item, FromRouter):
            self._perform(self._core.on_frame(item))
        elif isinstance(item, RouterGone):
            self._perform(self._core.on_router_gone(item))
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
                case Tell(message=message, router=router):
                    self._routers.tell(message, router)
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
    routers = RouterLinks(who, hello_of(core, mesh), inbox, mesh, clock, turns)
    loop = WorkerLoop(core, mesh, routers, inbox, clock, turns, who.drain_s)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: loop.drain())
    obey_fault_signals(mesh, core, os.environ)
    try:
        loop.run()
    finally:
        routers.close()
        mesh.close()
        engine.memory.close()
    return 0
