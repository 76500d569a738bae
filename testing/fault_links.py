"""Links that are slow, lossy, or spoil a frame: conditions for the tap of the fault matrix."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ..core.ids import WorkerKey
from ..protocol.messages import Heartbeat, Push
from .events import EventQueue
from .fault_tap import Carry, decodes
from .tap import Crossing

PACKET_BYTES = 1460
RETRANSMIT_S = 0.2  # first timeout of a TCP sender on Linux; doubles
BLOCK_BYTES = 16 << 10  # what a block counts as: a small model's, as the fake engine's 64 bytes would not be felt

Link = frozenset[str]


def wire_bytes(crossing: Crossing, frame: bytes) -> int:
    """Bytes that this frame puts on the wire, its blocks included."""
    num_blocks = len(crossing.message.ordinals) if isinstance(crossing.message, Push) else 0
    return len(frame) + num_blocks * BLOCK_BYTES


@dataclass(slots=True)
class _Queue:
    """One direction of a connection: what comes later leaves later."""

    free_at: float = 0.0


def _direction(crossing: Crossing) -> tuple[WorkerKey, bool]:
    """Names a connection's direction: between workers blocks have one of their own."""
    return crossing.source, isinstance(crossing.message, Push)


@dataclass(slots=True)
class Slow:
    """A link of `bits_per_s`. `nbytes` and `delayed_s` are measured, from the moment of sending to that of release."""

    events: EventQueue
    link: Link
    bits_per_s: float
    until: float
    nbytes: int = 0
    num_frames: int = 0
    delayed_s: float = 0.0
    _queues: dict[tuple[WorkerKey, bool], _Queue] = field(default_factory=dict)

    def touches(self, crossing: Crossing) -> bool:
        return crossing.link == self.link and crossing.left_at < self.until

    def leaves(self, crossing: Crossing, frame: bytes, carry: Carry) -> None:
        now, nbytes = self.events.clock.now(), wire_bytes(crossing, frame)
        queue = self._queues.setdefault(_direction(crossing), _Queue())
        queue.free_at = max(now, queue.free_at) + 8 * nbytes / self.bits_per_s
        self.events.after(queue.free_at - now, lambda: self._release(crossing, nbytes, frame, carry))

    def _release(self, crossing: Crossing, nbytes: int, frame: bytes, carry: Carry) -> None:
        self.nbytes += nbytes
        self.num_frames += 1
        self.delayed_s += self.events.clock.now() - crossing.left_at
        carry(frame)


@dataclass(slots=True)
class Lossy:
    """Packets get lost and are sent again after a timeout that doubles; what is behind them on the stream waits.

    The first packet is lost for certain, so that the fault always happens.
    """

    events: EventQueue
    link: Link
    probability: float
    until: float
    rng: random.Random
    num_packets: int = 0
    num_lost: int = 0
    longest_s: float = 0.0  # measured
    _queues: dict[tuple[WorkerKey, bool], _Queue] = field(default_factory=dict)

    def touches(self, crossing: Crossing) -> bool:
        return crossing.link == self.link and crossing.left_at < self.until

    def leaves(self, crossing: Crossing, frame: bytes, carry: Carry) -> None:
        now = self.events.clock.now()
        queue = self._queues.setdefault(_direction(crossing), _Queue())
        late_s = sum(self._late_s() for _ in range(-(-wire_bytes(crossing, frame) // PACKET_BYTES)))
        queue.free_at = max(now + late_s, queue.free_at)
        self.events.after(queue.free_at - now, lambda: self._release(crossing, frame, carry))

    def _late_s(self) -> float:
        self.num_packets += 1
        late_s, timeout_s = 0.0, RETRANSMIT_S
        while self.num_lost == 0 or self.rng.random() < self.probability:
            self.num_lost += 1
            late_s, timeout_s = late_s + timeout_s, 2 * timeout_s
        return late_s

    def _release(self, crossing: Crossing, frame: bytes, carry: Carry) -> None:
        self.longest_s = max(self.longest_s, self.events.clock.now() - crossing.left_at)
        carry(frame)


Change = Callable[[Crossing, bytes], bytes]


@dataclass(slots=True)
class OneFrame:
    """The next frame on a link, heartbeats aside: `change` says what becomes of its bytes."""

    link: Link
    change: Change
    original: bytes | None = None
    changed: bytes | None = None
    crossing: Crossing | None = None

    def touches(self, crossing: Crossing) -> bool:
        return self.crossing is None and crossing.link == self.link and not isinstance(crossing.message, Heartbeat)

    def leaves(self, crossing: Crossing, frame: bytes, carry: Carry) -> None:
        self.crossing, self.original = crossing, frame
        self.changed = self.change(crossing, frame)
        carry(self.changed)


@dataclass(slots=True)
class Repeated:
    """The next frame on a link, heartbeats aside, arrives, and arrives again `late_s` later."""

    events: EventQueue
    link: Link
    late_s: float
    crossing: Crossing | None = None

    def touches(self, crossing: Crossing) -> bool:
        return self.crossing is None and crossing.link == self.link and not isinstance(crossing.message, Heartbeat)

    def leaves(self, crossing: Crossing, frame: bytes, carry: Carry) -> None:
        self.crossing = crossing
        carry(frame)
        self.events.after(self.late_s, lambda: carry(frame))


def flip_a_byte(rng: random.Random) -> Change:
    """Alters one byte so that the decoder refuses the frame.

    Between workers a MAC refuses every flip. The control link has none: a flip that still decodes is left to the
    checksum of the kernel's transport, and is not what this fault is about.
    """

    def change(crossing: Crossing, frame: bytes) -> bytes:
        for position in rng.sample(range(len(frame)), len(frame)):
            changed = bytearray(frame)
            changed[position] ^= 1 << rng.randrange(8)
            if not decodes(crossing, bytes(changed)):
                return bytes(changed)
        return frame

    return change


def cut_short(_: Crossing, frame: bytes) -> bytes:
    return frame[: len(frame) // 2]
