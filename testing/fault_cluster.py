"""The simulated cluster of the fault matrix: it can do to processes and links what the fourteen kinds of faults do."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

from ..core.errors import ServeError, Unavailable
from ..core.ids import WorkerKey
from ..engine import kv_memory
from ..engine.interface import OnLayers, ScheduledSeq
from ..protocol.messages import FromWorker, Goodbye, Role, SampledToken
from ..router.core import RouterCore
from ..router.effects import Effect, End
from ..router.interface import EndEvent, GenerateRequest
from .chaos import ChaosProfile
from .cluster import ROUTER_TICK_S, ClusterShape, SimCluster
from .fake_engine import FakeEngine
from .fault_tap import FaultTap
from .sim_worker import CLUSTER_KEY, SimWorker
from .tap import ROUTER

DRAIN_S = 20.0
DRAIN_LOOK_S = 0.02
LIVENESS_S = 1.5  # silence that ends a hand-off link
RECONNECT_S = 0.3  # longer than a heartbeat, so that something is always under way

Batch = list[ScheduledSeq]


class FaultEngine(FakeEngine):
    """Tells when a step begins, and can be made to fail in the next one."""

    on_step: Callable[[Batch], None] | None = None
    num_raised = 0
    _is_armed = False
    _failing: frozenset[int] = frozenset()

    def arm(self) -> None:
        """The next batch fails as a whole, and then each of its entries alone."""
        self._is_armed = True

    def cost_s(self, batch: Batch) -> float:
        """Asked when a step begins."""
        if self.on_step is not None:
            self.on_step(batch)
        return super().cost_s(batch)

    def cost_of(self, batch: Batch) -> float:
        """The same, and nobody is told."""
        return super().cost_s(batch)

    def execute(self, batch: Batch, on_layers: OnLayers | None = None) -> list[tuple[SampledToken, ...]]:
        names = frozenset(id(entry.seq) for entry in batch)
        if self._is_armed:
            self._is_armed, self._failing = False, names
            self._fail(f"a step of {len(batch)} sequences")
        if names <= self._failing:
            self._failing -= names
            self._fail(f"the step of {batch[0].seq.key}")
        return super().execute(batch, on_layers)

    def _fail(self, what: str) -> None:
        self.num_raised += 1
        raise RuntimeError(f"planted: {what} fails")


class FaultCluster(SimCluster):
    """A perfect network and immortal processes, until somebody strikes. `observe_step` hears of every step."""

    def __init__(self, shape: ClusterShape, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.observe_step: Callable[[str, Batch], None] | None = None
        self.full_starts: Counter[str] = Counter()  # process → how often its next starts find no space
        self.refused_starts: Counter[str] = Counter()
        self.is_router_up, self.router_stopped_until = True, 0.0
        self.ended_at: dict[str, float] = {}
        self.longest_backlog = 0.0  # seconds that a frame has waited for the router
        self._router_backlog: list[tuple[float, bytes]] = []
        self._client_backlog: list[GenerateRequest] = []
        super().__init__(shape, ChaosProfile(by_hand=True), seed, trace)
        self.fault_tap = FaultTap(self.clock, self.events, self._on_refused)
        self.tap = self.network.tap = self.fault_tap

    # ---- workers ----

    def worker(self, worker_id: str) -> SimWorker:
        return self.workers[worker_id]

    def engine(self, worker_id: str) -> FaultEngine:
        engine = self.workers[worker_id].engine
        assert isinstance(engine, FaultEngine)
        return engine

    def make_engine(self, role: Role, weights: str = "fake") -> FaultEngine:
        return FaultEngine(self.shape.num_blocks, self.shape.block_size, weights=weights)

    def start_worker(self, worker_id: str, role: Role) -> None:
        """Start a process; where there is no space it ends at once, and the supervisor tries again."""
        try:
            with full_disk(self.full_starts[worker_id] > 0):
                super().start_worker(worker_id, role)
        except OSError as error:
            self.full_starts[worker_id] -= 1
            self.refused_starts[worker_id] += 1
            self.say(f"{worker_id} does not start: {error}")
            self.events.after(self.shape.restart_s, lambda: self.start_worker(worker_id, role))
            return
        self.engine(worker_id).on_step = lambda batch: self._on_step(worker_id, batch)

    def _on_step(self, worker_id: str, batch: Batch) -> None:
        if self.observe_step is not None:
            self.observe_step(worker_id, batch)

    def terminate_worker(self, worker_id: str) -> None:
        """SIGTERM: it takes nothing new, finishes, says goodbye and ends; the supervisor starts it again."""
        worker = self.workers[worker_id]
        worker.core.drain()
        self._end_when_idle(worker, self.clock.now() + DRAIN_S)

    def _end_when_idle(self, worker: SimWorker, until: float) -> None:
        if not worker.is_alive:
            return
        if not worker.core.is_idle and self.clock.now() < until:
            self.events.after(DRAIN_LOOK_S, lambda: self._end_when_idle(worker, until))
            return
        self._to_router(worker.key, FromWorker(*worker.key, Goodbye()))
        self.kill_worker(worker.key.worker_id, tell_router=False)

    def stop_worker(self, worker_id: str, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after `seconds`: what is sent to it waits in its sockets, its peers end their links."""
        worker = self.workers[worker_id]
        self.fault_tap.hold(lambda crossing: worker.key in (crossing.source, crossing.target), seconds)
        worker.freeze(seconds)
        for peer, _ in worker.mesh.linked():
            self._cut_after(worker.key, peer, LIVENESS_S, seconds)

    def silence(self, one: str, other: str, seconds: float) -> None:
        """Nothing passes between two processes for so long; then whatever the sockets still hold arrives."""
        link = frozenset((one, other))
        self.fault_tap.hold(lambda crossing: crossing.link == link, seconds)
        if ROUTER.worker_id not in link:
            self._cut_after(self.workers[one].key, self.workers[other].key, LIVENESS_S, seconds)

    def _cut_after(self, one: WorkerKey, other: WorkerKey, liveness_s: float, seconds: float) -> None:
        if seconds > liveness_s:
            self.events.after(liveness_s, lambda: self.network.cut(one, other, seconds - liveness_s))

    def reset_link(self, one: str, other: str) -> None:
        """RST of the connections between two processes: what is under way is lost, and they meet again soon."""
        self.fault_tap.reset(frozenset((one, other)), RECONNECT_S)
        if ROUTER.worker_id not in (one, other):
            self.network.cut(self.workers[one].key, self.workers[other].key, RECONNECT_S)

    # ---- frames ----

    def _on_refused(self, source: WorkerKey, target: WorkerKey) -> None:
        """A frame that does not decode ends a link between workers; the router and its workers drop it."""
        if ROUTER not in (source, target):
            self.network.cut(source, target, RECONNECT_S)

    def hear_worker(self, frame: bytes) -> None:
        if self.is_router_up and not self.is_router_stopped:
            super().hear_worker(frame)
        else:
            self._router_backlog.append((self.clock.now(), frame))

    # ---- the router's process ----

    @property
    def is_router_stopped(self) -> bool:
        return self.clock.now() < self.router_stopped_until

    def submit(self, request: GenerateRequest) -> None:
        if self.is_router_stopped:
            self._client_backlog.append(request)
        elif self.is_router_up:
            super().submit(request)
        else:
            self.faults["refused unavailable"] += 1  # nobody listens on the port

    def _tick_router(self) -> None:
        if self.is_router_up and not self.is_router_stopped:
            super()._tick_router()
        else:
            self.events.after(ROUTER_TICK_S, self._tick_router)

    def _perform(self, effects: list[Effect]) -> None:
        if self.is_router_up:
            self._note_ends([effect.request_id for effect in effects if isinstance(effect, End)])
            super()._perform(effects)

    def _note_ends(self, request_ids: list[str]) -> None:
        self.ended_at.update(dict.fromkeys(request_ids, self.clock.now()))

    def kill_router(self) -> None:
        """SIGKILL of the front: every stream that it holds breaks off, and a new router starts with a new epoch."""
        self.faults["kill router"] += 1
        self._break_streams(Unavailable("the connection to the front broke"))
        self._restart_router()

    def terminate_router(self) -> None:
        """SIGTERM of the front: it refuses new requests, finishes the running ones, and is started again."""
        self._perform(self.router.drain())
        self._restart_when_done(self.router, self.clock.now() + DRAIN_S)

    def stop_router(self, seconds: float) -> None:
        """SIGSTOP and SIGCONT: afterwards the frames that wait come first, then what clients sent, then time."""
        self.router_stopped_until = self.clock.now() + seconds
        self.events.after(seconds, self._wake_router)

    def _restart_when_done(self, router: RouterCore, until: float) -> None:
        if self.router is not router:
            return
        if router.status().active_requests and self.clock.now() < until:
            self.events.after(DRAIN_LOOK_S, lambda: self._restart_when_done(router, until))
            return
        self._break_streams(Unavailable("the front has ended"))
        self._restart_router()

    def _break_streams(self, error: ServeError) -> None:
        for request_id, record in self.journal.records.items():
            if record.end is None:
                self._note_ends([request_id])
                self.journal.on_end(request_id, EndEvent(error))

    def _restart_router(self) -> None:
        self.is_router_up = False
        self.events.after(self.shape.restart_s, self._start_router)

    def _start_router(self) -> None:
        if self.full_starts[ROUTER.worker_id] > 0:
            self.full_starts[ROUTER.worker_id] -= 1
            self.refused_starts[ROUTER.worker_id] += 1
            self.events.after(self.shape.restart_s, self._start_router)
            return
        self.router = RouterCore(self.shape.router, self.clock, self._ids, CLUSTER_KEY)
        self.is_router_up = True
        self._wake_router()

    def _wake_router(self) -> None:
        frames, self._router_backlog = self._router_backlog, []
        requests, self._client_backlog = self._client_backlog, []
        for came_at, frame in frames:
            self.longest_backlog = max(self.longest_backlog, self.clock.now() - came_at)
            self.hear_worker(frame)
        for request in requests:
            self.submit(request)

    def is_serving(self) -> bool:
        """Every process is there again, and the router knows it."""
        if not self.is_router_up or self.is_router_stopped or self.router.is_draining:
            return False
        rows = {row.worker_id: row for row in self.router.status().workers}
        expected = self.shape.num_prefill + self.shape.num_decode
        return len(rows) == expected and all(
            self.workers[name].is_alive and row.epoch == self.workers[name].key.epoch and row.state == "ready"
            for name, row in rows.items()
        )


class _FullDisk(ModuleType):
    """`os` as it is when there is no space left for a KV pool."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def ftruncate(self, fd: int, length: int) -> None:
        raise OSError(errno.ENOSPC, f"planted: no space left for {length} bytes")


def full_disk(is_full: bool) -> AbstractContextManager[object]:
    """While it is entered, a KV pool finds no space."""
    return patch.object(kv_memory, "os", _FullDisk("os")) if is_full else nullcontext()
