"""What happens to frames on the simulated wires of the fault matrix, and what an observer on the wire sees.

Frames are held, slowed, lost and sent again, cut short, altered or repeated by *conditions*; the tap counts what came
of each, from the bytes themselves, so that a fault which did not happen is noticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..core.errors import ProtocolError
from ..core.ids import WorkerKey
from ..protocol import codec
from ..protocol.messages import Push
from .clock import FakeClock
from .events import EventQueue
from .tap import ROUTER, Crossing, Tap

Carry = Callable[[bytes], None]
Wanted = Callable[[Crossing], bool]


class Condition(Protocol):
    """The state of a link. The first condition that touches a crossing decides when and with which bytes it goes on."""

    def touches(self, crossing: Crossing) -> bool: ...

    def leaves(self, crossing: Crossing, frame: bytes, carry: Carry) -> None: ...


@dataclass(slots=True)
class Hold:
    """Silence until a moment; then all that was held arrives in its order."""

    events: EventQueue
    wanted: Wanted
    until: float
    counts: Counter[str]

    def touches(self, crossing: Crossing) -> bool:
        return crossing.left_at < self.until and self.wanted(crossing)

    def leaves(self, crossing: Crossing, frame: bytes, carry: Carry) -> None:
        self.counts["held"] += 1
        self.events.after(self.until - crossing.left_at, lambda: carry(frame))


class FaultTap(Tap):
    """`on_refused(source, target)` hears of frames that their receiver could not decode."""

    def __init__(
        self, clock: FakeClock, events: EventQueue, on_refused: Callable[[WorkerKey, WorkerKey], None]
    ) -> None:
        self.clock, self.events, self._on_refused = clock, events, on_refused
        self.conditions: list[Condition] = []
        self.on_leave: Callable[[Crossing], bool] | None = None  # True: this frame is lost
        self.on_arrive: Callable[[Crossing], None] | None = None
        self.spoil_block: Callable[[Push, WorkerKey, WorkerKey, memoryview], None] | None = None
        self.last_left: dict[WorkerKey, float] = {}
        self.last_arrived: dict[frozenset[str], float] = {}
        self.arrivals: dict[Crossing, list[float]] = {}  # of the frames that `follow` names
        self.follow: Wanted | None = None
        self.counts: Counter[str] = Counter()
        self.said: Counter[tuple[WorkerKey, str]] = Counter()  # (sender, type) → messages
        self.codes: Counter[str] = Counter()  # error codes that somebody told somebody
        self._reset_at: dict[frozenset[str], float] = {}

    # ---- from the wires ----

    def leaves(self, crossing: Crossing, frame: bytes, carry: Carry) -> None:
        self.said[crossing.source, type(crossing.message).__name__] += 1
        self.codes[getattr(crossing.message, "code", "")] += 1
        is_lost = self.on_leave is not None and self.on_leave(crossing)

        def go(data: bytes) -> None:
            self.last_left[crossing.source] = self.clock.now()
            carry(data)

        for condition in self.conditions:
            if condition.touches(crossing):
                condition.leaves(crossing, frame, go)
                return
        if not is_lost:
            go(frame)

    def arrives(self, crossing: Crossing, frame: bytes, deliver: Carry) -> None:
        if crossing.left_at <= self._reset_at.get(crossing.link, -1.0):
            self.counts["lost by reset"] += 1
            return
        self.last_arrived[crossing.link] = self.clock.now()
        if self.follow is not None and self.follow(crossing):
            self.arrivals.setdefault(crossing, []).append(self.clock.now())
        if not decodes(crossing, frame):
            self.counts["refused"] += 1
            self._on_refused(crossing.source, crossing.target)
            return
        deliver(frame)
        if self.on_arrive is not None:
            self.on_arrive(crossing)

    def copied(self, push: Push, source: WorkerKey, target: WorkerKey, view: memoryview) -> None:
        if self.spoil_block is not None:
            self.spoil_block(push, source, target, view)

    # ---- from the faults ----

    def hold(self, wanted: Wanted, seconds: float) -> None:
        """Nothing that is `wanted` passes for so long."""
        self.conditions.insert(0, Hold(self.events, wanted, self.clock.now() + seconds, self.counts))

    def reset(self, link: frozenset[str], reconnect_s: float) -> None:
        """What is under way on `link` never arrives; what is sent before the two meet again waits."""
        self._reset_at[link] = self.clock.now()
        self.hold(lambda crossing: crossing.link == link, reconnect_s)


def decodes(crossing: Crossing, frame: bytes) -> bool:
    """Whether the receiver's decoder takes these bytes."""
    try:
        if crossing.source == ROUTER:
            codec.from_router.decode(frame)
        elif crossing.target == ROUTER:
            codec.from_worker.decode(frame)
        else:
            codec.handoff.decode(frame)
    except ProtocolError:
        return False
    return True
