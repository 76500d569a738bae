"""Time: leases end (I8), deadlines are kept (I12), and ready is true (I13)."""

from __future__ import annotations

from ..core.ids import AttemptKey, Ticket, WorkerKey
from ..engine.interface import ScheduledSeq
from ..kvtransfer.effects import LinkEvent, MessageArrived
from ..protocol.messages import FromRouter, Grant, Heartbeat, Offer, Renew, StartDecode, StartPrefill
from ..router.core import RouterCore
from .clock import FakeClock
from .invariants import InvariantBroken
from .sim_worker import SimWorker

SLACK_S = 0.15  # the router looks at its timers every so often


class LeaseWatch:
    """I8: a hand-off outlives the last word of its peer about it by a lease, and not longer.

    Where a destination has given up and waits for its link, one lease more.
    """

    def __init__(self, clock: FakeClock, lease_s: float) -> None:
        self._clock, self._lease_s = clock, lease_s
        self._source_heard: dict[tuple[WorkerKey, Ticket], float] = {}
        self._destination_heard: dict[tuple[WorkerKey, Ticket], float] = {}

    def offers(self, worker: SimWorker, ticket: Ticket) -> None:
        self._source_heard[worker.key, ticket] = self._clock.now()

    def granted(self, worker: SimWorker, ticket: Ticket) -> None:
        self._destination_heard[worker.key, ticket] = self._clock.now()

    def heard(self, worker: SimWorker, event: LinkEvent) -> None:
        """Any word about a ticket, right or wrong, is more than enough: the check errs on the side of patience."""
        if not isinstance(event, MessageArrived):
            ticket = getattr(event, "ticket", None)
            if ticket is not None and (worker.key, ticket) in self._destination_heard:
                self._destination_heard[worker.key, ticket] = self._clock.now()
            return
        now, message = self._clock.now(), event.message
        tickets = message.tickets if isinstance(message, Renew) else [getattr(message, "ticket", b"")]
        for ticket in map(Ticket, tickets):
            key = (worker.key, ticket)
            if isinstance(message, Grant | Renew) and key in self._source_heard:
                self._source_heard[key] = now
            if isinstance(message, Offer) or key in self._destination_heard:
                self._destination_heard[key] = now

    def turned(self, worker: SimWorker) -> None:
        """Right after the timers of `worker` have run."""
        now = self._clock.now()
        for ticket in worker.source.active():
            self._check(worker.key, "source", ticket, now - self._source_heard.get((worker.key, ticket), now), 1)
        for ticket in worker.destination.active():
            silent_s = now - self._destination_heard.get((worker.key, ticket), now)
            self._check(worker.key, "destination", ticket, silent_s, 2)

    def _check(self, key: WorkerKey, side: str, ticket: Ticket, silent_s: float, leases: int) -> None:
        if silent_s > leases * self._lease_s + 1e-6 + (leases - 1) * SLACK_S:
            raise InvariantBroken(
                f"I8 {key}: {side} of {ticket.hex()[:8]} lives {silent_s:.2f} s after its peer's last word, "
                f"the lease is {self._lease_s:g} s"
            )


class DeadlineWatch:
    """I12: neither the router nor a worker starts something whose time is over, or which has ended."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._requests: dict[str, float] = {}
        self._attempts: dict[tuple[WorkerKey, AttemptKey], float] = {}

    def accepted(self, request_id: str, timeout_s: float) -> None:
        self._requests[request_id] = self._clock.now() + timeout_s

    def dispatched(self, message: StartPrefill | StartDecode) -> None:
        deadline = self._requests.get(message.request_id)
        if deadline is not None and self._clock.now() >= deadline:
            raise InvariantBroken(f"I12 router: {message.request_id} is dispatched after its deadline")

    def arrived(self, worker: SimWorker, frame: FromRouter) -> None:
        """The worker's own time for an attempt runs from the command's arrival."""
        body = frame.body
        if isinstance(body, StartPrefill | StartDecode):
            key = (worker.key, AttemptKey(body.request_id, body.attempt, frame.router))
            self._attempts.setdefault(key, self._clock.now() + body.timeout_s)

    def handled(self, worker: SimWorker, frame: FromRouter) -> None:
        """The loop has taken the command; what waited in the inbox meanwhile is not the attempt's time."""
        body = frame.body
        if isinstance(body, StartPrefill | StartDecode):
            key = (worker.key, AttemptKey(body.request_id, body.attempt, frame.router))
            self._attempts[key] = max(self._attempts.get(key, 0.0), self._clock.now() + body.timeout_s)

    def scheduled(self, worker: SimWorker, entry: ScheduledSeq) -> None:
        if not any(entry.seq.key in role.active() for role in worker.core.roles):
            raise InvariantBroken(f"I12 {worker.key}: computes {entry.seq.key}, which has ended here")
        deadline = self._attempts.get((worker.key, entry.seq.key))
        if deadline is not None and self._clock.now() >= deadline:
            raise InvariantBroken(f"I12 {worker.key}: computes {entry.seq.key} after its deadline")


class HealthWatch:
    """I13: who is called ready has spoken lately, and its loop turns.

    `max_step_s`: how long a loop may be in one turn and still be called ready by its own heartbeats.
    """

    def __init__(self, clock: FakeClock, worker_timeout_s: float, max_step_s: float) -> None:
        self._clock, self._timeout_s, self._max_step_s = clock, worker_timeout_s, max_step_s
        self._heard: dict[WorkerKey, float] = {}

    def heard(self, key: WorkerKey) -> None:
        self._heard[key] = self._clock.now()

    def beats(self, worker: SimWorker, beat: Heartbeat) -> None:
        turn_s = worker.turn_age_s
        if beat.state == "ready" and turn_s > self._max_step_s + SLACK_S:
            raise InvariantBroken(f"I13 {worker.key}: says ready, and its loop has not turned for {turn_s:.2f} s")

    def check(self, router: RouterCore) -> None:
        """What the router would answer to a probe now."""
        status, now = router.status(), self._clock.now()
        ready = [row for row in status.workers if row.state == "ready"]
        for row in ready:
            key = WorkerKey(row.worker_id, row.epoch)
            silent_s = now - self._heard.get(key, 0.0)
            if silent_s > self._timeout_s + SLACK_S:
                raise InvariantBroken(f"I13 router: calls {key} ready after {silent_s:.2f} s of silence")
        if status.ready and not any(row.role != "prefill" for row in ready):
            raise InvariantBroken("I13 router: calls the cluster ready without a ready decode worker")
