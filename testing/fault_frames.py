"""Faults that are done to a link, or to one frame on it."""

from __future__ import annotations

import random

from ..core.ids import WorkerKey
from ..protocol.messages import Push
from .fault import SLACK_S, Aim, Fault, Target
from .fault_cluster import FaultCluster
from .fault_links import RETRANSMIT_S, Lossy, OneFrame, Repeated, Slow, cut_short, flip_a_byte

SILENCE_S = 3.0
BAD_LINK_S = 5.0  # how long a link stays slow or lossy
BITS_PER_S = 1e6
LOSS = 0.05
LATE_S = 0.7


class _LinkFault(Fault):
    """Something done to the connection of two processes."""

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self.link = frozenset(aim.ends)


class Silence(_LinkFault):
    """The link carries nothing for three seconds, and says nothing about it."""

    @property
    def lasts_s(self) -> float:
        return SILENCE_S + SLACK_S

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._held_before = self.tap.counts["held"]
        self._arrived_last = self.since
        cluster.events.after(SILENCE_S - SLACK_S, self._look)

    def strike(self) -> None:
        self.cluster.silence(*self.aim.ends, SILENCE_S)

    def _look(self) -> None:
        self._arrived_last = self.tap.last_arrived.get(self.link, 0.0)

    @property
    def is_pending(self) -> bool:
        is_over = self.cluster.clock.now() > self.since + SILENCE_S
        return not is_over and self.tap.counts["held"] == self._held_before

    def verify(self) -> str:
        late_s = self._arrived_last - self.since
        if late_s > SLACK_S:  # what was under way still arrives
            return f"a frame arrived {late_s:.3f} s into the silence"
        return "" if self.tap.counts["held"] > self._held_before else "no frame was held up"


class Bandwidth(_LinkFault):
    """1 Mbit/s for five seconds. A block counts as 16 KiB: the fake engine's own would not be felt."""

    @property
    def lasts_s(self) -> float:
        return BAD_LINK_S

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._slow = Slow(cluster.events, self.link, BITS_PER_S, self.since + BAD_LINK_S)

    def strike(self) -> None:
        self.tap.conditions.append(self._slow)

    @property
    def is_pending(self) -> bool:
        is_over = self.cluster.clock.now() > self.since + BAD_LINK_S
        return not is_over and not self._slow.num_frames

    def verify(self) -> str:
        slow = self._slow
        if not slow.num_frames:
            return "nothing passed the slow link"
        least_s = 0.999 * 8 * slow.nbytes / BITS_PER_S
        if slow.delayed_s < least_s:
            return f"{slow.nbytes} bytes were delayed by {slow.delayed_s:.4f} s, at least {least_s:.4f} s are due"
        return ""


class Loss(_LinkFault):
    """5 % of the packets are lost for five seconds, the first one for certain.

    TCP sends them again, so to the processes it is a matter of time: late frames, and all behind them late too.
    """

    @property
    def lasts_s(self) -> float:
        return BAD_LINK_S

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._lossy = Lossy(cluster.events, self.link, LOSS, self.since + BAD_LINK_S, rng)

    def strike(self) -> None:
        self.tap.conditions.append(self._lossy)

    @property
    def is_pending(self) -> bool:
        is_over = self.cluster.clock.now() > self.since + BAD_LINK_S
        return not is_over and not self._lossy.longest_s

    def verify(self) -> str:
        lossy = self._lossy
        if not lossy.num_lost:
            return f"none of {lossy.num_packets} packets was lost"
        return "" if lossy.longest_s >= RETRANSMIT_S * 0.999 else f"the longest delay was {lossy.longest_s:.3f} s"


class _Spoiled(_LinkFault):
    """One frame, changed so that its receiver refuses it. Between workers that ends the link."""

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._refused_before = self.tap.counts["refused"]
        self._frame = OneFrame(self.link, flip_a_byte(rng))

    def strike(self) -> None:
        self.tap.conditions.append(self._frame)

    @property
    def is_pending(self) -> bool:
        return self.tap.counts["refused"] == self._refused_before

    def verify(self) -> str:
        if self._frame.changed == self._frame.original:
            return "no frame was changed"
        refused = self.tap.counts["refused"] - self._refused_before
        return "" if refused == 1 else f"{refused} frames were refused, one should"


class CorruptFrame(_Spoiled):
    """A frame with a flipped bit; of a Push, where blocks are the target, a bit of a block on its way."""

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._mismatches_before = self.tap.codes["checksum_mismatch"]
        self._spoiled: tuple[bytes, bytes] | None = None

    def strike(self) -> None:
        if self.aim.target is Target.BLOCKS:
            self.tap.spoil_block = self._spoil
        else:
            super().strike()

    def _spoil(self, push: Push, source: WorkerKey, target: WorkerKey, view: memoryview) -> None:
        if self._spoiled is None and {source.worker_id, target.worker_id} == self.link:
            before = bytes(view)
            view[self.rng.randrange(len(view))] ^= 1 << self.rng.randrange(8)
            self._spoiled = (before, bytes(view))

    @property
    def is_pending(self) -> bool:
        return self._spoiled is None if self.aim.target is Target.BLOCKS else super().is_pending

    def verify(self) -> str:
        if self.aim.target is not Target.BLOCKS:
            return super().verify()
        if self._spoiled is None or self._spoiled[0] == self._spoiled[1]:
            return "no block was changed"
        found = self.tap.codes["checksum_mismatch"] - self._mismatches_before
        return "" if found else "nobody noticed the changed block"


class TruncatedFrame(_Spoiled):
    """Half a frame. On a stream that is where the connection ended; a queue of whole frames refuses it alone."""

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._frame = OneFrame(self.link, cut_short)

    def verify(self) -> str:
        original, changed = self._frame.original, self._frame.changed
        if original is None or changed is None or len(changed) >= len(original):
            return "no frame was cut short"
        return super().verify()


class RepeatedFrame(_LinkFault):
    """A frame arrives, and arrives again 0.7 s later."""

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._frame = Repeated(cluster.events, self.link, LATE_S)
        self.tap.follow = lambda crossing: crossing is self._frame.crossing

    def strike(self) -> None:
        self.tap.conditions.append(self._frame)

    @property
    def lasts_s(self) -> float:
        crossing = self._frame.crossing
        return 0.0 if crossing is None else crossing.left_at - self.since + LATE_S + SLACK_S

    @property
    def is_pending(self) -> bool:
        return self._frame.crossing is None

    @property
    def _arrived(self) -> list[float]:
        crossing = self._frame.crossing
        return [] if crossing is None else self.tap.arrivals.get(crossing, [])

    def verify(self) -> str:
        arrived = self._arrived
        if len(arrived) != 2:
            return f"a frame arrived {len(arrived)} times, it should twice"
        gap_s = arrived[1] - arrived[0]
        return "" if gap_s >= LATE_S - SLACK_S else f"the second one came after {gap_s:.3f} s"
