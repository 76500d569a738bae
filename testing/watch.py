"""Everything that watches a simulated cluster, and what each event of it is shown to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..core.ids import Ticket, WorkerKey
from ..engine.interface import ScheduledSeq
from ..kvtransfer.effects import AcceptBlocks, LinkEvent, SendBlocks, SendMessage
from ..protocol.messages import (
    Ack,
    BlockNews,
    Done,
    FromRouter,
    FromWorker,
    HandoffMessage,
    Heartbeat,
    Offer,
    Push,
    StartDecode,
    StartPrefill,
)
from ..router.config import RouterConfig
from ..router.core import RouterCore
from ..router.effects import Effect, Send
from ..router.interface import GenerateRequest
from ..worker.core import CoreEffect
from ..worker.role import Tell
from ..worker.routers import RouterGone
from ..worker.within_step import Item
from .chaos import ChaosProfile
from .clock import FakeClock
from .invariants import InvariantBroken, broken, guarded
from .journal import Journal
from .sim_worker import SimWorker
from .watch_blocks import BlockWatch
from .watch_messages import check_counted, counted, is_late, is_late_at_router, num_stale
from .watch_news import check_known_blocks
from .watch_router import RouterWatch
from .watch_time import DeadlineWatch, HealthWatch, LeaseWatch

FULL_ROUTER_AUDIT_EVERY = 16


class Watch:
    """One for a cluster and a router of it. Every check raises InvariantBroken at the event that broke the promise, or
    soon behind it.

    `silent_ends` names the hand-offs that a worker has given up without a word: of all that it has offered, given those
    that are alive there. `blocks`: those of the workers, where another router's watch sees them already.
    """

    def __init__(
        self,
        clock: FakeClock,
        journal: Journal,
        config: RouterConfig,
        profile: ChaosProfile,
        silent_ends: Callable[[WorkerKey, list[Ticket]], list[bytes]],
        *,
        lease_s: float,
        max_step_s: float,
        blocks: BlockWatch | None = None,
    ) -> None:
        self.journal, self._silent_ends = journal, silent_ends
        self.blocks = blocks or BlockWatch()
        self.leases = LeaseWatch(clock, lease_s)
        self.deadlines = DeadlineWatch(clock)
        self.health = HealthWatch(clock, config.worker_timeout_s, max_step_s)
        self.routing = RouterWatch(config, profile)
        self._num_router_events = 0

    # ---- clients and router ----

    def accepted(self, request: GenerateRequest) -> None:
        self.deadlines.accepted(request.request_id, request.timeout_s)

    def router_performs(self, effects: list[Effect]) -> None:
        self.routing.performs(effects)
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message.body, StartPrefill | StartDecode):
                self.deadlines.dispatched(effect.message.body)
                if isinstance(effect.message.body, StartPrefill):
                    self.blocks.dispatched(effect.message.body)

    def router_hears(self, router: RouterCore, frame: FromWorker) -> list[Effect]:
        """Let the router handle `frame`; its effects."""
        self.health.heard(WorkerKey(frame.worker_id, frame.epoch))
        before, counted_before = self.routing.before(router, frame), counted(router)
        is_late_frame = is_late_at_router(frame, self.journal)
        kind = type(frame.body).__name__
        is_over = self.journal.is_over(getattr(frame.body, "request_id", ""))
        try:
            effects = router.on_message(frame)
        except Exception as error:
            raise broken("I9", "router", f"{kind} of {frame.worker_id} is fatal", error) from error
        self.routing.after(router, frame, before, effects, is_over)
        if is_late_frame and counted(router) == counted_before:
            raise InvariantBroken(f"I9 router: a late {kind} of {frame.worker_id} was not counted")
        return effects

    def router_turned(self, router: RouterCore, *, is_audit: bool = False) -> None:
        """Its books are recounted every now and then: a wrong sum does not heal."""
        self._num_router_events += 1
        if is_audit or self._num_router_events % FULL_ROUTER_AUDIT_EVERY == 0:
            self.routing.check_queues(router)

    # ---- workers ----

    def arrived(self, worker: SimWorker, frame: FromRouter) -> None:
        self.deadlines.arrived(worker, frame)

    def hears(self, worker: SimWorker, item: Item) -> list[CoreEffect]:
        """Let the worker handle `item`; its effects."""
        if isinstance(item, RouterGone):
            with guarded("I9", worker.key, "the end of a router is fatal"):
                return worker.core.on_router_gone(item)
        if isinstance(item, FromRouter):
            self.deadlines.handled(worker, item)
            try:
                return worker.core.on_frame(item)
            except Exception as error:
                raise broken("I9", worker.key, f"{type(item.body).__name__} is fatal", error) from error
        self.heard(worker, item)
        is_late_event, stale_before = is_late(worker, item), num_stale(worker)
        try:
            effects = worker.core.on_link(item)
        except Exception as error:
            raise broken("I9", worker.key, f"{_kind(item)} is fatal", error) from error
        if is_late_event:
            check_counted(worker, item, stale_before)
        return effects

    def heard(self, worker: SimWorker, event: LinkEvent) -> None:
        self.leases.heard(worker, event)

    def scheduled(self, worker: SimWorker, entries: Sequence[ScheduledSeq]) -> None:
        for entry in entries:
            self.deadlines.scheduled(worker, entry)

    def performs(self, worker: SimWorker, effect: CoreEffect) -> None:
        match effect:
            case AcceptBlocks():
                self.blocks.accepts(worker, effect)
                self.leases.granted(worker, effect.ticket)
            case SendBlocks():
                self.blocks.pushes(worker, effect)
            case SendMessage(message=Offer() as offer):
                self.leases.offers(worker, Ticket(offer.ticket))
            case SendMessage(message=Ack() as ack):
                self.blocks.acknowledges(worker, Ticket(ack.ticket))
            case _:
                return

    def leaves(self, source: WorkerKey, message: HandoffMessage, num_layers: int) -> None:
        """A message goes onto the link."""
        if isinstance(message, Push):
            self.blocks.pushed(source, message)
        elif isinstance(message, Done):
            self.blocks.finishes(source, message, num_layers)

    def beats(self, worker: SimWorker, beat: Heartbeat) -> None:
        self.health.beats(worker, beat)

    def turned(self, worker: SimWorker, *, has_ticked: bool, is_changed: bool) -> None:
        """`is_changed`: something was heard, done or begun in this turn."""
        self.blocks.turned(worker, is_changed=is_changed)
        if has_ticked:
            self.leases.turned(worker)
        silent = self._silent_ends(worker.key, worker.source.active())
        if silent:
            raise InvariantBroken(f"I8 {worker.key}: gave up hand-off {silent[0].hex()[:8]} and told nobody")
        if worker.destination.num_early > worker.max_early:
            raise InvariantBroken(f"I11 {worker.key}: keeps {worker.destination.num_early} early offers")

    # ---- at rest ----

    def check_at_rest(self, router: RouterCore, workers: list[SimWorker]) -> None:
        """Every request has ended, every block and seat is back (I4, I8), and nothing is in the tables."""
        self.journal.check_finished()
        self.router_turned(router, is_audit=True)
        check_known_blocks(router, workers)
        for worker in workers:
            self.blocks.audit(worker)
            check_empty(worker, "I8", "at rest")

    def check_timers(self, worker: SimWorker) -> None:
        """Every timer that anyone may still have goes off now, and finds nothing to do."""
        with guarded("I9", worker.key, "a timer that nobody needs is fatal"):
            effects = worker.core.tick()
            batch, more = worker.core.begin_step()
        found = [effect for effect in effects + more if not _is_news(effect)]
        if found or batch:
            raise InvariantBroken(f"I8 {worker.key}: at rest, and a timer still finds something to do: {found}")
        check_empty(worker, "I8", "after the last timer")


def check_empty(worker: SimWorker, name: str, when: str) -> None:
    """Nothing is held and nothing is open; what breaks is called `name`."""
    load = worker.core.snapshot().load
    if load.free_blocks != load.total_blocks:
        num_held = load.total_blocks - load.free_blocks
        raise InvariantBroken(f"{name} {worker.key}: {num_held} blocks are still held {when}")
    if load.parked_bytes:
        raise InvariantBroken(f"{name} {worker.key}: {load.parked_bytes} bytes are still parked {when}")
    if worker.proposer is not None and worker.proposer.known:
        raise InvariantBroken(f"{name} {worker.key}: drafts for {len(worker.proposer.known)} sequences {when}")
    if worker.source.active() or worker.destination.active():
        raise InvariantBroken(f"{name} {worker.key}: hand-offs are still open {when}")
    seats = load.running + load.waiting + load.receiving + load.handing_off
    if seats or worker.core.snapshot().active:
        raise InvariantBroken(f"{name} {worker.key}: {seats} seats are still taken {when}")


def _is_news(effect: CoreEffect) -> bool:
    return isinstance(effect, Tell) and isinstance(effect.message, BlockNews)


def _kind(event: LinkEvent) -> str:
    return type(getattr(event, "message", event)).__name__
