"""The router's promises: bounds (I11), both legs or none, no blame for a caller's fault (I14), nothing new for whoever
drains (I15). And what its workers owe it: an attempt ends as cancelled only when the router has said so (I1).
"""

from __future__ import annotations

from collections import Counter

from ..core.ids import AttemptKey, Ticket, WorkerKey
from ..protocol.messages import Abort, AttemptFailed, FromWorker, Heartbeat, PrefillEnded, StartDecode, StartPrefill
from ..router.config import RouterConfig
from ..router.core import RouterCore
from ..router.effects import Deliver, Effect, Send
from .chaos import ChaosProfile
from .invariants import InvariantBroken, guarded

CALLERS_FAULT = frozenset({"bad_request", "deadline_exceeded"})


class RouterWatch:
    """Where the profile forbids faults, it also forbids their consequences."""

    def __init__(self, config: RouterConfig, profile: ChaosProfile) -> None:
        self._config, self._profile = config, profile
        self._tries: Counter[str] = Counter()  # in a row without a new token
        self._last_attempt: dict[str, int] = {}
        self._tickets: set[bytes] = set()
        self._draining: set[WorkerKey] = set()
        self._aborted: set[AttemptKey] = set()

    def begin_again(self) -> None:
        """Another incarnation of the router: no attempt that the old one has started is current."""
        self._last_attempt.clear()

    # ---- I14, I15: what it sends ----

    def performs(self, effects: list[Effect]) -> None:
        decodes: dict[Ticket, tuple[WorkerKey, StartDecode]] = {}
        prefills: dict[Ticket, tuple[WorkerKey, StartPrefill]] = {}
        for effect in effects:
            match effect:
                case Send(worker, message) if isinstance(message.body, StartDecode):
                    self._starts(worker, message.body)
                    if message.body.ticket is not None:
                        decodes[Ticket(message.body.ticket)] = (worker, message.body)
                case Send(worker, message) if isinstance(message.body, StartPrefill):
                    self._check_draining(worker, message.body)
                    prefills[Ticket(message.body.ticket)] = (worker, message.body)
                case Send(_, message) if isinstance(message.body, Abort) and message.body.choice is None:
                    self._aborted.add(AttemptKey(message.body.request_id, message.body.attempt))
                case Deliver(request_id, event) if event.tokens:
                    self._tries[request_id] = 0
        self._check_legs(decodes, prefills)

    def _starts(self, worker: WorkerKey, message: StartDecode) -> None:
        name = message.request_id
        self._check_draining(worker, message)
        if message.attempt <= self._last_attempt.get(name, 0):
            raise InvariantBroken(f"I14 router: attempt {message.attempt} of {name} is started twice")
        self._last_attempt[name] = message.attempt
        self._tries[name] += 1
        if self._tries[name] > self._config.max_attempts:
            bound = self._config.max_attempts
            raise InvariantBroken(
                f"I14 router: {name} is tried {self._tries[name]} times in vain, the bound is {bound}"
            )

    def _check_legs(
        self,
        decodes: dict[Ticket, tuple[WorkerKey, StartDecode]],
        prefills: dict[Ticket, tuple[WorkerKey, StartPrefill]],
    ) -> None:
        for ticket in sorted(decodes.keys() ^ prefills.keys()):
            side = "decode" if ticket in decodes else "prefill"
            raise InvariantBroken(f"I14 router: only {side} hears of hand-off {ticket.hex()[:8]}")
        for ticket, (destination, decode) in decodes.items():
            source, prefill = prefills[ticket]
            is_pair = (decode.prefill_worker, decode.prefill_epoch) == source
            is_pair = is_pair and (prefill.decode_worker, prefill.decode_epoch) == destination
            if not is_pair or (decode.request_id, decode.attempt) != (prefill.request_id, prefill.attempt):
                raise InvariantBroken(
                    f"I14 router: the two sides of hand-off {ticket.hex()[:8]} do not name each other"
                )
            if ticket in self._tickets:
                raise InvariantBroken(f"I5 router: ticket {ticket.hex()[:8]} names two hand-offs, so two may write")
            self._tickets.add(ticket)

    def _check_draining(self, worker: WorkerKey, message: StartDecode | StartPrefill) -> None:
        if worker in self._draining:
            raise InvariantBroken(f"I15 router: sends {message.request_id} to {worker}, which has said that it drains")

    # ---- I14: what it hears ----

    def before(self, router: RouterCore, frame: FromWorker) -> list[str]:
        return _live(router) if _is_callers_fault(frame) else []

    def after(
        self, router: RouterCore, frame: FromWorker, before: list[str], effects: list[Effect], is_over: bool
    ) -> None:
        """`is_over`: the request that the frame is about had ended before it came."""
        key, body = WorkerKey(frame.worker_id, frame.epoch), frame.body
        if isinstance(body, Heartbeat) and body.state == "draining" and self._profile.keeps_order:
            self._draining.add(key)
        if self._profile.is_lossless and router.counters.broken_streams:
            raise InvariantBroken(f"I3 router: a stream of {key} broke though no message was lost, doubled or late")
        if not isinstance(body, AttemptFailed | PrefillEnded):
            return
        is_current = not is_over and body.attempt == self._last_attempt.get(body.request_id)
        if is_current:
            self._check_cancelled(key, body)
        if _is_callers_fault(frame):
            starts = [
                e for e in effects if isinstance(e, Send) and isinstance(e.message.body, StartDecode | StartPrefill)
            ]
            again = [s for s in starts if getattr(s.message.body, "request_id", "") == body.request_id]
            if again or _live(router) != before:
                what = "tries it again" if again else "takes a worker out"
                raise InvariantBroken(f"I14 router: {body.request_id} failed by {body.code}, and the router {what}")
            return
        if self._profile.is_perfect and is_current and (isinstance(body, AttemptFailed) or not body.ok):
            raise InvariantBroken(
                f"I14 {key}: {body.request_id} fails by {body.code} where nothing is lost: {body.message}"
            )

    def _check_cancelled(self, key: WorkerKey, body: AttemptFailed | PrefillEnded) -> None:
        """The router tries such an attempt again, so that no client sees what a worker has ended by mistake.

        What has ended may have been another router's: for its successor a worker gives up all that it asked for.
        """
        attempt = AttemptKey(body.request_id, body.attempt)
        if body.code == "cancelled" and attempt not in self._aborted:
            raise InvariantBroken(f"I1 {key}: {attempt} ended as cancelled, and nobody cancelled it")

    # ---- I11 ----

    def check_door(self, num_queued: int) -> None:
        """One more was accepted while so many waited. Those that are tried again queue whatever the bound."""
        if num_queued >= self._config.max_queued_requests:
            raise InvariantBroken(
                f"I11 router: takes a request while {num_queued} wait, the bound is {self._config.max_queued_requests}"
            )

    def check_queues(self, router: RouterCore) -> None:
        with guarded("I11", "router", "books"):
            router.check_invariants()
        num_active, config = router.status().active_requests, self._config
        if num_active > config.max_active_requests:
            raise InvariantBroken(f"I11 router: {num_active} requests, the bound is {config.max_active_requests}")
        num_known = len(router._life.placer.index)
        if num_known > config.max_prefix_blocks:
            raise InvariantBroken(
                f"I11 router: knows {num_known} prefix blocks, the bound is {config.max_prefix_blocks}"
            )


def _is_callers_fault(frame: FromWorker) -> bool:
    return isinstance(frame.body, AttemptFailed | PrefillEnded) and frame.body.code in CALLERS_FAULT


def _live(router: RouterCore) -> list[str]:
    return [f"{row.worker_id}@{row.epoch}" for row in router.status().workers if row.state in ("ready", "draining")]
