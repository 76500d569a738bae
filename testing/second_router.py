"""A second router on the workers of a simulated cluster, with clients of its own.

It knows nothing of the first one and uses the same request ids; its process may be killed and started again. What it
promises its clients is watched like the first one's promises, and what the first one promises must hold beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ..core.errors import ServeError, Unavailable
from ..core.ids import IdSource, WorkerKey
from ..protocol import codec
from ..protocol.messages import FromRouter, FromWorker
from ..router.core import RouterCore
from ..router.effects import Deliver, Effect, End, Send
from ..router.interface import EndEvent, GenerateRequest
from ..worker.routers import ROUTER_GONE_S
from .chaos import Wire
from .invariants import guarded
from .story import tell
from .watch import Watch

NAME = "second"


@dataclass(frozen=True, slots=True)
class SecondPlan:
    """What happens to it: requests and kills at times after the workers have met, and how long a restart takes."""

    requests: tuple[tuple[float, GenerateRequest], ...] = ()
    kills: tuple[float, ...] = ()
    restart_s: float = 0.5


class SecondRouter:
    """`make_wire` gives each way to each worker a wire of its own; `to_worker` hands a frame to a worker, and
    `tell_gone` tells all of them that there has been no connection for a while.
    """

    def __init__(
        self,
        plan: SecondPlan,
        watch: Watch,
        make_core: Callable[[IdSource], RouterCore],
        ids: IdSource,
        make_wire: Callable[[], Wire],
        to_worker: Callable[[WorkerKey, FromRouter], None],
        tell_gone: Callable[[str], None],
        after: Callable[[float, Callable[[], None]], None],
        say: Callable[[str], None],
        faults: Counter[str],
    ) -> None:
        self.watch, self.journal = watch, watch.journal
        self._plan, self._make_core, self._ids, self._make_wire = plan, make_core, ids, make_wire
        self._to_worker, self._tell_gone, self._after, self._say = to_worker, tell_gone, after, say
        self._faults = faults
        self._wires: dict[WorkerKey, tuple[Wire, Wire]] = {}
        self.core = make_core(ids)
        self.is_up = True

    # ---- clients ----

    def submit(self, request: GenerateRequest) -> None:
        """Nobody listens while its process is down."""
        if not self.is_up:
            return
        try:
            effects = self.core.submit(request)
        except ServeError:
            return
        self.journal.accept(request)
        self.watch.accepted(request)
        self._perform(effects)

    # ---- its process ----

    def kill(self) -> None:
        """SIGKILL: every stream that it holds breaks off; a new incarnation starts after `restart_s`."""
        if not self.is_up:
            return
        self.is_up = False
        self._faults[f"router {NAME} killed"] += 1
        self._say(f"router {NAME} is killed")
        for request_id, record in self.journal.records.items():
            if record.end is None:
                self.journal.on_end(request_id, EndEvent(Unavailable("the connection to the front broke")))
        self._after(ROUTER_GONE_S, self._look)
        self._after(self._plan.restart_s, self._restart)

    def _look(self) -> None:
        if not self.is_up:
            self._tell_gone(NAME)

    def _restart(self) -> None:
        self.core, self.is_up = self._make_core(self._ids), True
        self.watch.routing.begin_again()
        self._say(f"router {NAME} starts again")

    # ---- wires ----

    def calm(self) -> None:
        for wires in self._wires.values():
            for wire in wires:
                wire.is_calm = True

    def _wires_of(self, worker: WorkerKey) -> tuple[Wire, Wire]:
        if worker not in self._wires:
            self._wires[worker] = self._make_wire(), self._make_wire()
        return self._wires[worker]

    def hear_later(self, frame: FromWorker) -> None:
        """A worker says something; it is on its way."""
        data = codec.from_worker.encode(frame)
        kind = type(frame.body).__name__
        if kind != "Heartbeat":
            self._say(f"{frame.worker_id} → {NAME}  {tell(frame.body)}")
        self._wires_of(WorkerKey(frame.worker_id, frame.epoch))[1].carry(kind, lambda: self._hear(data))

    def _hear(self, data: bytes) -> None:
        if self.is_up:
            self._perform(self.watch.router_hears(self.core, codec.from_worker.decode(data)))

    def tick(self) -> None:
        """Its timers."""
        if self.is_up:
            with guarded("I9", NAME, "a timer is fatal"):
                effects = self.core.tick()
            self._perform(effects)

    def _perform(self, effects: list[Effect]) -> None:
        self.watch.router_performs(effects)
        for effect in effects:
            match effect:
                case Send(worker, message):
                    self._send(worker, message)
                case Deliver(request_id, event):
                    self.journal.on_tokens(request_id, event)
                case End(request_id, event):
                    self.journal.on_end(request_id, event)
        if effects:
            self.watch.router_turned(self.core)

    def _send(self, worker: WorkerKey, message: FromRouter) -> None:
        """The connection says who speaks, as in `worker.router_links`."""
        data = codec.from_router.encode(message)
        self._say(f"{NAME} → {tell(worker)}  {tell(message.body)}")

        def deliver() -> None:
            self._to_worker(worker, msgspec.structs.replace(codec.from_router.decode(data), router=NAME))

        self._wires_of(worker)[0].carry(type(message.body).__name__, deliver)

    def check_at_rest(self) -> None:
        """Every request of its clients has ended, and its books balance."""
        self.journal.check_finished()
        self.watch.router_turned(self.core, is_audit=True)
