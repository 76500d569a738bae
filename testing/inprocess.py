"""A cluster in one thread: router core, worker cores, any engine, and real hand-off links; no processes, no HTTP.

For tests that compare what different ways through the system answer: with a model, with a fake engine, over shared
memory, over TCP; undisturbed, and with workers, links or router connections lost at a chosen moment.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..core.block_names import name_key
from ..core.clock import Clock, MonotonicClock
from ..core.errors import ServeError
from ..core.ids import MAIN_ROUTER, SeededIds, WorkerKey, new_epoch
from ..decode_node.role import DecodeRole
from ..engine.block_pool import BlockPool
from ..engine.interface import Engine, ScheduledSeq
from ..engine.parking import Parking
from ..engine.speculation.interface import Speculation
from ..kvtransfer.destination import DestinationTable
from ..kvtransfer.link import Mesh
from ..kvtransfer.mesh import MeshSettings, SocketMesh
from ..kvtransfer.socket_link import LinkTimes
from ..kvtransfer.source import PushSizes, SourceTable
from ..kvtransfer.transports.inproc import InprocMesh, InprocNetwork
from ..prefill_node.role import PrefillRole
from ..protocol.messages import FromRouter, FromWorker, Heartbeat, Role, SampledToken
from ..router.config import RouterConfig
from ..router.core import RouterCore
from ..router.effects import Deliver, Effect, End, Send
from ..router.interface import GenerateRequest, TokensEvent
from ..worker.core import ROLES_OF, BecomeRole, CoreEffect, SetPeers, WorkerCore
from ..worker.process import hello_of
from ..worker.role import Role as RoleCode
from ..worker.role import Tell
from ..worker.routers import RouterGone
from ..worker.within_step import Item

BEAT_S = 0.25
CLUSTER_KEY = b"one process"
PATIENCE_S = 60.0  # for leases, links and heartbeats: a busy machine is no fault here

Speculate = Callable[[Engine], Speculation | None]  # what a decode worker with this engine drafts with


@dataclass(slots=True)
class Answer:
    """What one choice got."""

    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


@dataclass(slots=True)
class Result:
    answers: list[Answer]
    error: ServeError | None = None
    is_ended: bool = False
    attempts: int = 0
    resumed: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)


class _Worker:
    """One worker core with its mesh and inbox."""

    def __init__(
        self,
        key: WorkerKey,
        role: Role,
        engine: Engine,
        clock: Clock,
        sizes: Mapping[str, int],
        park_bytes: int,
        speculate: Speculate,
    ) -> None:
        self.key = key
        pool = BlockPool(engine.spec.num_blocks, engine.spec.block_size)
        self.decode: DecodeRole | None = None

        def host(name: Role) -> RoleCode:
            if name == "prefill":
                pushes = PushSizes.of(engine.spec.fingerprint.num_layers, engine.spec.layer_bytes)
                source = SourceTable(PATIENCE_S, PATIENCE_S, pushes)
                return PrefillRole(key, engine.spec, pool, source, CLUSTER_KEY)
            parking = Parking(engine.memory, park_bytes, clock)
            destination = DestinationTable(PATIENCE_S)
            self.decode = DecodeRole(
                key, engine.spec, pool, destination, CLUSTER_KEY, parking=parking, speculation=speculate(engine)
            )
            return self.decode

        roles = [host(name) for name in ROLES_OF[role]]
        self.core = WorkerCore(
            key,
            role,
            engine,
            pool,
            roles,
            clock,
            max_batch_tokens=sizes["max_batch_tokens"],
            max_batch_seqs=sizes["max_batch_seqs"],
            make_role=host,
            block_secret=name_key(CLUSTER_KEY),
        )
        self.inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self.mesh: Mesh | None = None
        self.received = 0
        self._deferred: deque[Item] = deque()

    def perform(self, effects: list[CoreEffect], tell: Callable[[FromWorker], None]) -> None:
        assert self.mesh is not None
        for effect in effects:
            match effect:
                case Tell(message=message):
                    tell(FromWorker(*self.key, message))
                case SetPeers(peers=peers):
                    self.mesh.set_peers(list(peers))
                case BecomeRole(role=role):
                    self.mesh.set_role(role)
                case _:
                    self.mesh.perform(effect)

    def _handle(self, item: Item, tell: Callable[[FromWorker], None]) -> None:
        if isinstance(item, FromRouter):
            self.received = max(self.received, item.number)
            self.perform(self.core.on_frame(item), tell)
        elif isinstance(item, RouterGone):
            self.perform(self.core.on_router_gone(item), tell)
        else:
            self.perform(self.core.on_link(item), tell)

    def turn(self, tell: Callable[[FromWorker], None]) -> bool:
        """Handle what has arrived and run one step; False when there was nothing to do."""
        progressed = False
        while self._deferred or not self.inbox.empty():
            item = self._deferred.popleft() if self._deferred else self.inbox.get_nowait()
            self._handle(item, tell)
            progressed = True
        self.perform(self.core.tick(), tell)
        batch, effects = self.core.begin_step()
        self.perform(effects, tell)
        if batch:
            results = self.core.compute(batch, lambda layers: self._on_layers(batch, layers, tell))
            self.perform(self.core.end_step(batch, results), tell)
        self.core.check_invariants()
        if self.decode is not None:
            self.decode.check_invariants()
        return progressed or bool(batch)

    def _on_layers(
        self, batch: list[tuple[RoleCode, ScheduledSeq]], num_layers: int, tell: Callable[[FromWorker], None]
    ) -> None:
        while not self.inbox.empty():
            self._deferred.append(self.inbox.get_nowait())
        for item in self.core.take_within_step(batch, self._deferred):
            self._handle(item, tell)
        self.perform(self.core.layers_computed(batch, num_layers), tell)


def _mesh_of(worker: _Worker) -> Mesh:
    assert worker.mesh is not None
    return worker.mesh


class InProcessCluster:
    """`engines` by worker name;

    a name starts with its role (`prefill-0`, `decode-0`, `both-0`). Use as a context manager.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        transport: str = "inproc",
        runtime_dir: Path | None = None,
        max_batch_tokens: int = 512,
        max_batch_seqs: int = 64,
        router: RouterConfig | None = None,
        park_bytes: int = 0,
        settings: MeshSettings | None = None,
        speculate: Speculate = lambda engine: None,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings or MeshSettings((transport,))
        self._clock, ids = clock or MonotonicClock(), SeededIds(0)
        self.router = RouterCore(
            router or RouterConfig(worker_timeout_s=PATIENCE_S, unacknowledged_s=PATIENCE_S),
            self._clock,
            ids,
            CLUSTER_KEY,
        )
        self._network = InprocNetwork()
        self._results: dict[str, Result] = {}
        self._next_beat = self._clock.now()
        self._sizes = {"max_batch_tokens": max_batch_tokens, "max_batch_seqs": max_batch_seqs}
        self._ids, self._transport, self._runtime_dir, self._park_bytes = ids, transport, runtime_dir, park_bytes
        self._speculate = speculate
        self._loses: Callable[[FromWorker], bool] | None = None
        self._on_tokens: Callable[[str, TokensEvent], None] | None = None
        self._cut_off: set[str] = set()
        self.workers: dict[str, _Worker] = {}
        for name, engine in engines.items():
            self.workers[name] = self._make_worker(name, engine)
        for worker in self.workers.values():
            self._say_hello(worker)

    def _make_worker(self, name: str, engine: Engine) -> _Worker:
        role: Role = "prefill" if name.startswith("prefill") else "decode" if name.startswith("decode") else "both"
        key = WorkerKey(name, new_epoch(self._ids))
        worker = _Worker(key, role, engine, self._clock, self._sizes, self._park_bytes, self._speculate)
        worker.mesh = self._mesh(worker, role)
        return worker

    def _say_hello(self, worker: _Worker) -> None:
        self._tell(FromWorker(*worker.key, hello_of(worker.core, _mesh_of(worker))))

    def _mesh(self, worker: _Worker, role: Role) -> Mesh:
        engine, transport, runtime_dir = worker.core.engine, self._transport, self._runtime_dir
        if transport == "inproc":
            return InprocMesh(worker.key, role, engine.spec.fingerprint, engine.memory, worker.inbox.put, self._network)
        assert runtime_dir is not None, "socket transports need a folder"
        return SocketMesh(
            worker.key,
            role,
            engine.spec.fingerprint,
            engine.memory,
            worker.inbox.put,
            runtime_dir=runtime_dir,
            cluster_key=CLUSTER_KEY,
            settings=self._settings,
            times=LinkTimes(liveness_s=PATIENCE_S),
        )

    def __enter__(self) -> InProcessCluster:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            if worker.mesh is not None:
                worker.mesh.close()

    # ---- faults; call them between two turns, from the `each_turn` of `run` ----

    @property
    def results(self) -> dict[str, Result]:
        """What the requests of the present `run` have got so far."""
        return self._results

    def kill(self, name: str) -> None:
        """The worker's process is gone at once; the router is told, as by the kernel."""
        worker = self.workers.pop(name)
        if self._transport == "inproc":
            self._network.kill(worker.key)
        _mesh_of(worker).close()
        self._perform(self.router.process_ended(worker.key, "killed"))

    def restart(self, name: str, engine: Engine) -> None:
        """A new incarnation with an empty cache."""
        assert name not in self.workers, f"{name} lives"
        self.workers[name] = worker = self._make_worker(name, engine)
        self._say_hello(worker)

    def break_link(self, one: str, other: str) -> None:
        """The hand-off link between two workers breaks (inproc only); `mend_links` makes it anew."""
        self._network.disconnect(self.workers[one].key, self.workers[other].key)

    def mend_links(self) -> None:
        self._network.reconnect()

    def set_role(self, name: str, role: Role) -> None:
        """By the router, as an operator asks."""
        self._perform(self.router.set_role(name, role))

    def cut_off(self, name: str) -> None:
        """The connection between the router and this worker is lost: nothing arrives either way until `join_again`."""
        self._cut_off.add(name)

    def join_again(self, name: str) -> None:
        self._cut_off.discard(name)

    def deliver(self, frame: FromWorker) -> None:
        """A frame reaches the router, whatever is cut off."""
        self._perform(self.router.on_message(frame))

    def cancel(self, request_id: str) -> None:
        """The caller has enough."""
        self._perform(self.router.cancel(request_id))

    def lose(self, loses: Callable[[FromWorker], bool] | None) -> None:
        """From now on the frames to the router for which `loses` is true are lost."""
        self._loses = loses

    # ---- running ----

    def run(
        self,
        requests: list[GenerateRequest],
        timeout_s: float = 120.0,
        each_turn: Callable[[InProcessCluster], None] | None = None,
        on_tokens: Callable[[str, TokensEvent], None] | None = None,
    ) -> dict[str, Result]:
        """Submit all at once and turn until every one has ended. Raises TimeoutError."""
        self._on_tokens = on_tokens
        self._settle(timeout_s)
        self._results = {r.request_id: Result([Answer() for _ in range(r.params.n)]) for r in requests}
        for request in requests:
            self._perform(self.router.submit(request))
        self._until(lambda: all(result.is_ended for result in self._results.values()), timeout_s, each_turn)
        self._until(self._at_rest, timeout_s, each_turn)
        return self._results

    def _settle(self, timeout_s: float) -> None:
        """Until every decode worker and every prefill worker have a link to each other, and know it."""
        names = list(self.workers)
        wanted = {n: sum(m.split("-")[0] not in ("both", n.split("-")[0]) for m in names) for n in names}
        wanted |= dict.fromkeys((n for n in names if n.startswith("both")), 0)
        self._until(lambda: all(len(_mesh_of(w).linked()) >= wanted[n] for n, w in self.workers.items()), timeout_s)
        self._until(
            lambda: all(w.inbox.empty() for w in self.workers.values()) and not self._network.deliver_all(), timeout_s
        )
        self._beat()

    def _at_rest(self) -> bool:
        return all(
            w.core.is_idle and w.core.pool.num_free_blocks == w.core.pool.num_blocks for w in self.workers.values()
        )

    def _until(
        self,
        is_done: Callable[[], bool],
        timeout_s: float,
        each_turn: Callable[[InProcessCluster], None] | None = None,
    ) -> None:
        deadline = self._clock.now() + timeout_s
        while not is_done():
            if self._clock.now() > deadline:
                raise TimeoutError(f"after {timeout_s} s: {self.router.status()}")
            self._turn()
            if each_turn is not None:
                each_turn(self)

    def _turn(self) -> None:
        if self._clock.now() >= self._next_beat:
            self._beat()
        self._network.deliver_all()
        self._perform(self.router.tick())
        progressed = [worker.turn(self._tell) for worker in self.workers.values()]
        if not any(progressed):
            self._wait()

    def _wait(self) -> None:
        """Nothing to compute: give the link threads a moment."""
        worker = next(iter(self.workers.values()), None)
        if worker is None:
            time.sleep(0.001)
            return
        try:
            worker.inbox.put(worker.inbox.get(timeout=0.001))
        except queue.Empty:
            return

    def _beat(self) -> None:
        self._next_beat = self._clock.now() + BEAT_S
        for worker in self.workers.values():
            assert worker.mesh is not None
            snapshot = worker.core.snapshot()
            linked = [(peer.worker_id, peer.epoch, transport) for peer, transport in worker.mesh.linked()]
            active = [(key.request_id, key.attempt) for key in snapshot.active]
            _, received = snapshot.handled.get(MAIN_ROUTER, (None, 0))
            beat = Heartbeat(received, snapshot.state, snapshot.load, active, linked, role=snapshot.role)
            self._tell(FromWorker(*worker.key, beat))

    def _tell(self, frame: FromWorker) -> None:
        if frame.worker_id in self._cut_off or (self._loses is not None and self._loses(frame)):
            return
        self._perform(self.router.on_message(frame))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(worker=key, message=message):
                    self._send(key, message)
                case Deliver(request_id=request_id, event=event):
                    answer = self._results[request_id].answers[event.choice]
                    answer.tokens += event.tokens
                    answer.finish_reason = event.finish_reason
                    if self._on_tokens is not None:
                        self._on_tokens(request_id, event)
                case End(request_id=request_id, event=event):
                    result = self._results[request_id]
                    result.is_ended, result.error = True, event.error
                    result.attempts, result.resumed = event.attempts, event.resumed

    def _send(self, key: WorkerKey, message: FromRouter) -> None:
        worker = self.workers.get(key.worker_id)
        if worker is not None and worker.key == key and key.worker_id not in self._cut_off:
            worker.inbox.put(message)
