"""What a heartbeat says. Commands that have arrived but were not handled yet count as received and active, so a long
step never looks like a lost command.
"""

from __future__ import annotations

from collections import deque

from ..core.ids import AttemptKey, WorkerKey
from ..protocol.messages import FromRouter, Heartbeat, StartDecode, StartPrefill, WorkerLoad, WorkerState
from .core import Snapshot

MAX_STEP_S = 60.0


class HeartbeatBuilder:
    """Fed by the thread that receives commands; reads the loop's latest snapshot, which is replaced as a whole.

    A loop whose turn lasts longer than `max_step_s` is reported as stalled, until it turns again.
    """

    def __init__(self, max_step_s: float = MAX_STEP_S) -> None:
        self._max_step_s = max_step_s
        self._router_epoch: str | None = None
        self._received = 0
        self._pending: deque[tuple[int, AttemptKey]] = deque()

    def on_frame(self, frame: FromRouter) -> None:
        """A command has arrived and goes to the loop."""
        if frame.router_epoch != self._router_epoch:
            self._router_epoch, self._received = frame.router_epoch, 0
            self._pending.clear()
        self._received = max(self._received, frame.number)
        if isinstance(frame.body, StartPrefill | StartDecode):
            self._pending.append((frame.number, AttemptKey(frame.body.request_id, frame.body.attempt)))

    def build(
        self, snapshot: Snapshot | None, linked: list[tuple[WorkerKey, str]], turn_age_s: float = 0.0
    ) -> Heartbeat:
        """The heartbeat to send now. `turn_age_s`: since the loop began its last turn."""
        active: tuple[AttemptKey, ...] = ()
        if snapshot is not None:
            active = snapshot.active
            if snapshot.router_epoch == self._router_epoch:
                self._pending = deque(p for p in self._pending if p[0] > snapshot.handled)
        return Heartbeat(
            received=self._received,
            state=self._state(snapshot, turn_age_s),
            load=snapshot.load if snapshot else WorkerLoad(),
            active=[(k.request_id, k.attempt) for k in dict.fromkeys((*active, *(p[1] for p in self._pending)))],
            linked=[(peer.worker_id, peer.epoch, transport) for peer, transport in linked],
            turn_age_s=turn_age_s,
        )

    def _state(self, snapshot: Snapshot | None, turn_age_s: float) -> WorkerState:
        if turn_age_s > self._max_step_s:
            return "stalled"
        return snapshot.state if snapshot else "starting"
