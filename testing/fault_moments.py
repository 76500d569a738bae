"""The twelve moments in the life of a request at which the fault matrix strikes, and how each is recognised.

A moment is something that can be observed from outside: a frame of a certain type that leaves or arrives, a step that
begins, a request that waits. Only the victim's first attempt counts.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from ..core.ids import AttemptKey
from ..engine.interface import ScheduledSeq
from ..protocol.messages import Ack, Done, Grant, Offer, Output, Push, StartDecode, StartPrefill, Tokens
from .events import EventQueue
from .tap import Crossing

MID_STREAM_INDEX = 5
QUEUED_ON_DECODE_S = 0.004  # an offer that is not granted by then waits for room


class Moment(Enum):
    """In the order in which a request goes through them."""

    BEFORE_ACCEPT = "before accept"  # the client is about to submit
    QUEUED = "queued"  # accepted, and no worker has room
    PREFILL_CHOSEN = "P chosen"  # StartPrefill leaves the router
    MID_PREFILL = "mid-prefill chunk"  # a step with a chunk of it, not the last one, is half done
    DECODE_UNAWARE = "P done, D unaware"  # Done leaves prefill
    HANDSHAKE = "handshake"  # Grant, the answer to Offer, leaves decode
    MID_TRANSFER = "mid-block transfer"  # a Push leaves prefill, one has left before, more will follow
    ACK_LOST = "last block, ack lost"  # Ack leaves decode and never arrives
    DECODE_QUEUED = "D queued"  # the offer is there, and decode has no seat for it
    FIRST_TOKEN = "first token"  # Output with index 0 leaves decode
    MID_STREAM = "mid-stream"  # Output with a middle index leaves decode
    FINISH = "finish frame"  # Output with a finish_reason leaves decode; where drafts are verified, that step's

    @property
    def crowd(self) -> str:
        """Which place the other requests fill: the router's books, decode's seats, or none."""
        return {Moment.QUEUED: "router", Moment.DECODE_QUEUED: "decode"}.get(self, "none")


class MomentWatch:
    """Looks at everything and calls `on_moment` when the victim is at `wanted`, once.

    `prefill` and `decode` are the names of the workers of its first attempt, once they are known; `seen` has the time
    of each moment that was recognised.
    """

    def __init__(self, victim: str, wanted: Moment, events: EventQueue, on_moment: Callable[[], None]) -> None:
        self._victim, self._wanted, self._events, self._on_moment = victim, wanted, events, on_moment
        self.prefill, self.decode = "prefill-0", "decode-0"
        self.seen: dict[Moment, float] = {}
        self._ticket: bytes | None = None
        self._num_pushes = 0
        self._is_granted = False

    # ---- what is observed ----

    def submitting(self) -> None:
        self._happened(Moment.BEFORE_ACCEPT)

    def submitted(self, num_queued: int) -> None:
        if num_queued and self._ticket is None:
            self._happened(Moment.QUEUED)

    def computing(self, batch: list[ScheduledSeq], half_s: float) -> None:
        """A step has begun that lasts twice `half_s`."""
        for entry in batch:
            is_chunk = entry.seq.key == AttemptKey(self._victim, 1) and entry.seq.is_prefilling and not entry.sample
            if is_chunk and Moment.MID_PREFILL not in self.seen:
                self._events.after(half_s, lambda: self._happened(Moment.MID_PREFILL))

    def left(self, crossing: Crossing) -> bool:
        """A frame leaves its sender; True when it has to get lost for the moment's sake."""
        match crossing.message:
            case StartDecode(request_id=self._victim, attempt=1, ticket=bytes() as ticket):
                self._ticket, self.decode = ticket, crossing.target.worker_id
            case StartPrefill(request_id=self._victim, attempt=1):
                self.prefill = crossing.target.worker_id
                self._happened(Moment.PREFILL_CHOSEN)
            case Output(items=items):
                self._on_output([item for item in items if (item.request_id, item.attempt) == (self._victim, 1)])
            case Grant() | Push() | Done() | Ack() as message if message.ticket == self._ticket:
                return self._on_handoff(message)
        return False

    def arrived(self, crossing: Crossing) -> None:
        message = crossing.message
        if isinstance(message, Offer) and message.ticket == self._ticket:
            self._events.after(QUEUED_ON_DECODE_S, self._look_at_offer)

    # ---- inside ----

    def _on_handoff(self, message: Grant | Push | Done | Ack) -> bool:
        match message:
            case Grant():
                self._is_granted = True
                self._happened(Moment.HANDSHAKE)
            case Push():
                self._num_pushes += 1
                if self._num_pushes == 2:
                    self._happened(Moment.MID_TRANSFER)
            case Done():
                self._happened(Moment.DECODE_UNAWARE)
            case Ack():
                self._happened(Moment.ACK_LOST)
                return self._wanted is Moment.ACK_LOST
        return False

    def _on_output(self, items: list[Tokens]) -> None:
        for item in items:
            if item.finish_reason is not None:
                self._happened(Moment.FINISH)
            elif item.index == 0:
                self._happened(Moment.FIRST_TOKEN)
            elif item.index >= MID_STREAM_INDEX:
                self._happened(Moment.MID_STREAM)

    def _look_at_offer(self) -> None:
        if not self._is_granted:
            self._happened(Moment.DECODE_QUEUED)

    def _happened(self, moment: Moment) -> None:
        if moment in self.seen:
            return
        self.seen[moment] = self._events.clock.now()
        if moment is self._wanted:
            self._on_moment()
