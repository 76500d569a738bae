"""One worker without its sockets: an engine, a block pool, and the roles that share them.

    commands and link events → roles → one ragged batch → engine → roles → effects

The process (`worker.process`) feeds it frames and carries its effects out; the simulation does the same on virtual
time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

import msgspec

from ..core.clock import Clock
from ..core.errors import InternalError, ServeError
from ..core.ids import AttemptKey, WorkerKey
from ..engine.block_pool import BlockPool
from ..engine.interface import Engine, ScheduledSeq
from ..kvtransfer.effects import LinkEvent, PeerLost, PeerUp
from ..protocol.messages import (
    AttemptFailed,
    Drain,
    FromRouter,
    Peer,
    Peers,
    PrefillEnded,
    ResetPrefixCache,
    SampledToken,
    SetRole,
    StartDecode,
    StartPrefill,
    ToWorker,
    WatchBlocks,
    Welcome,
    WorkerLoad,
    WorkerState,
)
from ..protocol.messages import Role as RoleName
from .block_news import BlockNewsDesk
from .role import Budget, Computed, Effect, Role, Tell
from .routers import RouterGone, Routers, Tallies
from .usage import Usage
from .within_step import Item, take_now

ROLES_OF: dict[RoleName, tuple[RoleName, ...]] = {
    "prefill": ("prefill",),
    "decode": ("decode",),
    "both": ("decode", "prefill"),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a heartbeat needs, as of the last turn of the loop."""

    handled: Mapping[str, tuple[str, int]]  # router → its epoch, and the highest number of its commands
    state: WorkerState
    load: WorkerLoad
    active: tuple[AttemptKey, ...]
    role: RoleName | None = None
    tallies: Tallies = field(default_factory=dict)  # what the attempts of each take; empty where one router asks alone
    news: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # router → watch and number of its last news


@dataclass(frozen=True, slots=True)
class SetPeers:
    """Effect: tell the mesh which workers exist."""

    peers: tuple[Peer, ...]


@dataclass(frozen=True, slots=True)
class BecomeRole:
    """Effect: tell the mesh what this worker is for now."""

    role: RoleName


CoreEffect = Effect | SetPeers | BecomeRole
MakeRole = Callable[[RoleName], Role | None]  # prefill or decode, begun where the worker has to host it


class WorkerCore:
    """Sans-IO worker. Every call returns the effects it caused, in order."""

    def __init__(
        self,
        key: WorkerKey,
        role_name: RoleName,
        engine: Engine,
        pool: BlockPool,
        roles: list[Role],
        clock: Clock,
        *,
        max_batch_tokens: int = 512,
        max_batch_seqs: int = 64,
        make_role: MakeRole = lambda name: None,
        block_secret: bytes = b"",
    ) -> None:
        self._make_role = make_role
        self.key, self.role_name, self.engine, self.pool, self.roles = key, role_name, engine, pool, roles
        self._clock = clock
        self._max_tokens, self._max_seqs = max_batch_tokens, max_batch_seqs
        self._routers = Routers()
        self._news = BlockNewsDesk(pool, block_secret)
        self._is_draining = False
        self._steps = 0
        self._usage = Usage()
        self._linked: dict[WorkerKey, str] = {}

    # ---- inputs ----

    def on_frame(self, frame: FromRouter) -> list[CoreEffect]:
        """A command. A router that was restarted voids whatever the old one asked for."""
        now = self._clock.now()
        if self._routers.hear(frame):
            self._abort_all(frame.router, now)
        return self._on_command(frame.body, frame.router, now) + self._collect()

    def on_router_gone(self, gone: RouterGone) -> list[CoreEffect]:
        """Nobody waits for what this router has asked for. The others go on, and so do the links that they want."""
        if not self._routers.forget(gone.router):
            return []
        log.warning("router %s is gone; what it has asked for ends", gone.router)
        self._abort_all(gone.router, self._clock.now())
        # Without any router nobody says who is there, and the links stay for the next one.
        peers: list[CoreEffect] = [SetPeers(self._routers.peers())] if self._routers.epochs else []
        return peers + self._collect()

    def _abort_all(self, router: str, now: float) -> None:
        self._news.forget(router)
        for role in self.roles:
            role.abort_all(now, router)

    def _on_command(self, message: ToWorker, router: str, now: float) -> list[CoreEffect]:
        match message:
            case Welcome():
                return []
            case Peers(peers=peers):
                return [SetPeers(self._routers.set_peers(router, peers))]
            case Drain():
                self.drain()
            case WatchBlocks(watch=watch):
                self._news.watch(router, watch)
            case ResetPrefixCache():
                self.pool.reset_prefix_cache()
            case SetRole(role=role_name):
                return self._become(role_name, now)
            case StartPrefill() if not self._hosts("prefill"):
                reason = f"worker {self.key} has no prefill role"
                return [Tell(PrefillEnded(message.request_id, message.attempt, False, "node_lost", reason), router)]
            case StartDecode() if not self._hosts("decode"):
                reason = f"worker {self.key} has no decode role"
                return [Tell(AttemptFailed(message.request_id, message.attempt, "node_lost", reason, True), router)]
            case _:
                for role in self.roles:
                    role.on_command(message, now, router)
        return []

    def _become(self, name: RoleName, now: float) -> list[CoreEffect]:
        """Host what `name` needs beside what is hosted: a role that is not wanted any more goes on with what it has."""
        for needed in ROLES_OF[name]:
            role = None if self._hosts(needed) else self._make_role(needed)
            if role is not None:
                for peer, transport in self._linked.items():
                    role.on_link(PeerUp(peer, transport), now)
                self.roles.append(role)
        if not all(self._hosts(needed) for needed in ROLES_OF[name]):
            log.warning("worker %s cannot become %s: it has no way to host that", self.key, name)
            return []
        log.info("worker %s is for %s now, it was for %s", self.key, name, self.role_name)
        self.role_name = name
        return [BecomeRole(name)]

    def _hosts(self, name: RoleName) -> bool:
        return any(role.hands_off is (name == "prefill") for role in self.roles)

    def drain(self) -> None:
        """Say so in every heartbeat from now on: the router sends nothing new."""
        self._is_draining = True

    def on_link(self, event: LinkEvent) -> list[CoreEffect]:
        match event:
            case PeerUp(peer=peer, transport=transport):
                self._linked[peer] = transport
            case PeerLost(peer=peer):
                self._linked.pop(peer, None)
        for role in self.roles:
            role.on_link(event, self._clock.now())
        return self._collect()

    def tick(self) -> list[CoreEffect]:
        now = self._clock.now()
        for role in self.roles:
            role.tick(now)
        return self._collect() + [Tell(news, router) for router, news in self._news.take()]

    def _collect(self) -> list[CoreEffect]:
        return [effect for role in self.roles for effect in role.take_effects()]

    # ---- a step ----

    def begin_step(self) -> tuple[list[tuple[Role, ScheduledSeq]], list[CoreEffect]]:
        """Schedule. The effects (offers, grants) must leave before the step computes, so that peers work meanwhile."""
        now = self._clock.now()
        self._usage.begin(now)
        budget = Budget(self._max_tokens, self._max_seqs)
        batch = [(role, entry) for role in self.roles for entry in role.schedule(budget, now)]
        return batch, self._collect()

    def compute(
        self, batch: list[tuple[Role, ScheduledSeq]], on_layers: Callable[[int], None] | None = None
    ) -> list[tuple[SampledToken, ...] | ServeError]:
        """Run the batch; an error of the whole is narrowed down to the entries that cause it.

        `on_layers(n)` is called within the step: it may call `layers_computed`, and handle what `take_within_step`
        gives.
        """
        entries = [entry for _, entry in batch]
        try:
            return list(self.engine.execute(entries, on_layers))
        except Exception:
            log.exception("a step of %d sequences failed; running them one by one", len(entries))
        return [self._compute_alone(entry) for entry in entries]

    def _compute_alone(self, entry: ScheduledSeq) -> tuple[SampledToken, ...] | ServeError:
        try:
            return self.engine.execute([entry])[0]
        except ServeError as error:
            return error
        except Exception:
            log.exception("request %s failed in its step", entry.seq.key)
            return InternalError("the step of this request failed; the worker's log has the cause")

    def take_within_step(self, batch: list[tuple[Role, ScheduledSeq]], waiting: deque[Item]) -> Iterator[Item]:
        """Take out of `waiting` what may be handled while `batch` is computed: by `on_frame` or `on_link`, at once."""
        if not waiting:  # as after almost every layer of every step
            return iter(())
        computing = {entry.seq.key for _, entry in batch}
        has_prefill = any(role.hands_off for role in self.roles)
        return take_now(waiting, self._routers.epochs, computing, has_prefill, self._is_full)

    def _is_full(self) -> bool:
        return any(len(role.active()) >= role.max_requests for role in self.roles)

    def layers_computed(self, batch: list[tuple[Role, ScheduledSeq]], num_layers: int) -> list[CoreEffect]:
        """Within the step: so many layers of its new KV are in the cache."""
        now = self._clock.now()
        for role in self.roles:
            if role.hands_off:
                role.layers_computed([entry for owner, entry in batch if owner is role], num_layers, now)
        return self._collect()

    def end_step(
        self, batch: list[tuple[Role, ScheduledSeq]], results: list[tuple[SampledToken, ...] | ServeError]
    ) -> list[CoreEffect]:
        now = self._clock.now()
        self._steps += 1
        self._usage.end([entry for _, entry in batch], results, now)
        for role in self.roles:
            computed: list[Computed] = []
            for (owner, entry), result in zip(batch, results, strict=True):
                if owner is not role:
                    continue
                if isinstance(result, ServeError):
                    role.fail_entry(entry, result, now)
                else:
                    computed.append((entry, result))
            role.commit(computed, now)
        return self._collect()

    def has_work(self) -> bool:
        return any(role.has_work() for role in self.roles)

    # ---- views ----

    @property
    def is_idle(self) -> bool:
        """No attempt lives here, and no block is held for one that has ended: a write may still be on its way there."""
        return not any(role.active() or any(role.owners()) for role in self.roles)

    def snapshot(self) -> Snapshot:
        active = dict.fromkeys(key for role in self.roles for key in role.active())
        return Snapshot(
            self._routers.handled,
            "draining" if self._is_draining else "ready",
            self._load(),
            tuple(active),
            self.role_name,
            self._tallies(),
            self._news.told(),
        )

    def _tallies(self) -> Tallies:
        tallies: Tallies = {}
        if len(self._routers.epochs) > 1:
            for role in self.roles:
                role.tally(tallies)
        return tallies

    def _load(self) -> WorkerLoad:
        total = _sum_loads(role.load() for role in self.roles)
        return msgspec.structs.replace(
            total,
            total_blocks=self.pool.num_blocks,
            free_blocks=self.pool.num_free_blocks,
            cached_blocks=self.pool.num_cached_blocks,
            steps=self._steps,
            busy_s=self._usage.busy_s,
            prefill_tokens=self._usage.prefill_tokens,
            decode_tokens=self._usage.decode_tokens,
        )

    def check_invariants(self) -> None:
        """I4: every block is free, retained, or owned by exactly those who hold a reference."""
        self.pool.check_invariants([blocks for role in self.roles for blocks in role.owners()])


def _sum_loads(loads: Iterable[WorkerLoad]) -> WorkerLoad:
    sums: dict[str, int] = dict.fromkeys(WorkerLoad.__struct_fields__, 0)
    del sums["accepted_at"]
    accepted_at: tuple[int, ...] = ()
    for load in loads:
        for name in sums:
            sums[name] += getattr(load, name)
        accepted_at = tuple(a + b for a, b in zip_longest(accepted_at, load.accepted_at, fillvalue=0))
    return WorkerLoad(**sums, accepted_at=accepted_at)
