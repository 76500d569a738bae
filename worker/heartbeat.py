"""What a heartbeat says. Commands that have arrived but were not handled yet count as received and active, so a long
step never looks like a lost command.
"""

from __future__ import annotations

from collections import deque

from ..core.ids import MAIN_ROUTER, AttemptKey, WorkerKey
from ..protocol.messages import FromRouter, Heartbeat, StartDecode, StartPrefill, WorkerLoad, WorkerState
from .core import Snapshot
from .routers import others_load
from .turn_watch import TurnWatch

MAX_PAST_EPOCHS = 16  # of a router, whose frames may still be on their way


class HeartbeatBuilder:
    """Fed by the thread that receives the commands of one router; reads the loop's latest snapshot, which is replaced
    as a whole.
    """

    def __init__(self, turns: TurnWatch, router: str = MAIN_ROUTER) -> None:
        self._turns, self._router = turns, router
        self._router_epoch: str | None = None
        self._past: deque[str] = deque(maxlen=MAX_PAST_EPOCHS)
        self._received = 0
        self._pending: deque[tuple[int, AttemptKey]] = deque()

    def on_frame(self, frame: FromRouter) -> bool:
        """A command has arrived and goes to the loop. False when it must not: another incarnation of its router has
        spoken since.
        """
        if frame.router_epoch in self._past:
            return False
        if frame.router_epoch != self._router_epoch:
            if self._router_epoch is not None:
                self._past.append(self._router_epoch)
            self._router_epoch, self._received = frame.router_epoch, 0
            self._pending.clear()
        self._received = max(self._received, frame.number)
        if isinstance(frame.body, StartPrefill | StartDecode):
            self._pending.append((frame.number, AttemptKey(frame.body.request_id, frame.body.attempt, self._router)))
        return True

    def build(self, snapshot: Snapshot | None, linked: list[tuple[WorkerKey, str]]) -> Heartbeat:
        """The heartbeat to send now."""
        active: tuple[AttemptKey, ...] = ()
        if snapshot is not None:
            active = tuple(key for key in snapshot.active if key.router == self._router)
            epoch, handled = snapshot.handled.get(self._router, (None, 0))
            if epoch == self._router_epoch:
                self._pending = deque(p for p in self._pending if p[0] > handled)
        return Heartbeat(
            received=self._received,
            state=self._state(snapshot),
            load=snapshot.load if snapshot else WorkerLoad(),
            active=[(k.request_id, k.attempt) for k in dict.fromkeys((*active, *(p[1] for p in self._pending)))],
            linked=[(peer.worker_id, peer.epoch, transport) for peer, transport in linked],
            turn_age_s=self._turns.age_s(),
            role=snapshot.role if snapshot else None,
            others=others_load(snapshot.tallies, self._router) if snapshot else None,
            news=snapshot.news.get(self._router) if snapshot else None,
        )

    def _state(self, snapshot: Snapshot | None) -> WorkerState:
        if self._turns.is_stalled():
            return "stalled"
        return snapshot.state if snapshot else "starting"
