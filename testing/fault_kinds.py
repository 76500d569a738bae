"""The fourteen kinds of faults of the fault matrix, each with a proof that it happened.

A `Fault` is made at the moment, `strike`s once, and is asked at the end to `verify`: it looks at processes, frames and
times as they were observed, not at what `strike` meant to do. `verify` says why the fault did not happen, or nothing.
Where a kind has no meaning of its own on simulated wires it is replaced by what can be observed of it; its docstring
says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ..core.ids import WorkerKey
from ..protocol.messages import Push
from .fault_clock import SteppedWallClock
from .fault_cluster import FaultCluster
from .fault_links import RETRANSMIT_S, Lossy, OneFrame, Repeated, Slow, cut_short, flip_a_byte
from .sim_worker import HEARTBEAT_S
from .tap import ROUTER

STOP_S = 10.0
SILENCE_S = 3.0
BAD_LINK_S = 5.0  # how long a link stays slow or lossy
BITS_PER_S = 1e6
LOSS = 0.05
LATE_S = 0.7
CLOCK_STEP_S = 60.0
FULL_STARTS = 2  # starts that find no space before there is some
SLACK_S = 0.05


class Target(Enum):
    """What is struck."""

    ROUTER = "router"
    PREFILL = "P"
    DECODE = "D"
    TRANSFER = "P↔D"
    BLOCKS = "P→D blocks"
    TO_PREFILL = "router↔P"
    TO_DECODE = "router↔D"
    FORWARD = "clock +60 s"
    BACK = "clock −60 s"


PROCESSES = (Target.PREFILL, Target.DECODE, Target.ROUTER)
WORKERS = (Target.PREFILL, Target.DECODE)
LINKS = (Target.TRANSFER, Target.TO_PREFILL, Target.TO_DECODE)


@dataclass(frozen=True, slots=True)
class Aim:
    """Where a fault goes: the workers of the victim, and which part of it all."""

    target: Target
    prefill: str
    decode: str

    @property
    def process(self) -> str:
        names = {Target.PREFILL: self.prefill, Target.DECODE: self.decode, Target.ROUTER: ROUTER.worker_id}
        return names[self.target]

    @property
    def ends(self) -> tuple[str, str]:
        router = ROUTER.worker_id
        if self.target is Target.TO_PREFILL:
            return router, self.prefill
        return (router, self.decode) if self.target is Target.TO_DECODE else (self.prefill, self.decode)


class Fault:
    """Base of all: what there is when the moment has come."""

    lasts_s = 0.0

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        self.cluster, self.aim, self.rng = cluster, aim, rng
        self.tap, self.since = cluster.fault_tap, cluster.clock.now()

    def strike(self) -> None:
        """Do it."""

    @property
    def is_pending(self) -> bool:
        """It waits for traffic to happen to."""
        return False

    def verify(self) -> str:
        """Why it did not happen; empty when it did."""
        return "nothing was done"

    def close(self) -> None:
        """Undo what outlives the cluster."""


# ---- processes ----


class _ProcessFault(Fault):
    """Something done to one process."""

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self.name = aim.process
        self.is_router = self.name == ROUTER.worker_id
        self.router = cluster.router
        self.key = ROUTER if self.is_router else cluster.worker(self.name).key
        self.before = None if self.is_router else cluster.worker(self.name)

    def _why_not_replaced(self) -> str:
        """The old incarnation has to be gone and silent, and a new one to be there."""
        if self.is_router:
            return "the router is the same" if self.cluster.router is self.router else ""
        if self.before is not None and self.before.is_alive:
            return f"{self.key} is alive"
        if self.cluster.network.find(self.key) is not None:
            return f"{self.key} still has its links"
        successor = self.cluster.worker(self.name)
        return "" if successor.is_alive and successor.key != self.key else f"{self.name} was not started again"


class Kill(_ProcessFault):
    """kill -9: gone between two instructions, its sockets closed by the kernel; the supervisor notices at once."""

    tells_router = True

    def strike(self) -> None:
        if self.is_router:
            self.cluster.kill_router()
        else:
            self.cluster.kill_worker(self.name, tell_router=self.tells_router)

    def verify(self) -> str:
        spoke_at = self.tap.last_left.get(self.key, 0.0)
        if not self.is_router and spoke_at > self.since:
            return f"{self.key} spoke {spoke_at - self.since:.3f} s after its death"
        return self._why_not_replaced()


class OomKill(Kill):
    """The system kills for memory: the same signal, and nobody tells the router, who has to find out by itself."""

    tells_router = False


class Terminate(_ProcessFault):
    """SIGTERM: takes nothing new, finishes, says goodbye, ends, is started again."""

    def strike(self) -> None:
        if self.is_router:
            self.cluster.terminate_router()
        else:
            self.cluster.terminate_worker(self.name)

    def verify(self) -> str:
        if self.is_router and not self.router.is_draining:
            return "the router was not asked to drain"
        if not self.is_router and not self.tap.said[self.key, "Goodbye"]:
            return f"{self.key} did not say goodbye"
        return self._why_not_replaced()


class Stop(_ProcessFault):
    """SIGSTOP, SIGCONT after ten seconds: nothing is said or handled meanwhile, and the same process goes on."""

    lasts_s = STOP_S + SLACK_S

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._said_last = self.since
        cluster.events.after(STOP_S - SLACK_S, self._look)

    def strike(self) -> None:
        if self.is_router:
            self.cluster.stop_router(STOP_S)
        else:
            self.cluster.stop_worker(self.name, STOP_S)

    def _look(self) -> None:
        self._said_last = self.tap.last_left.get(self.key, 0.0)

    def verify(self) -> str:
        if self._said_last > self.since:
            return f"{self.name} spoke {self._said_last - self.since:.3f} s after it was stopped"
        if self.is_router:
            waited_s = self.cluster.longest_backlog
            is_long = waited_s >= STOP_S - HEARTBEAT_S - SLACK_S
            return "" if is_long else f"no frame waited for the router longer than {waited_s:.3f} s"
        if self.cluster.worker(self.name).key != self.key:
            return f"{self.key} did not live through it"
        last = self.tap.last_left.get(self.key, 0.0)
        return "" if last >= self.since + STOP_S else f"{self.key} did not go on"


class StepError(_ProcessFault):
    """The next step raises, first the whole batch and then every sequence in it alone."""

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._engine = cluster.engine(self.name)
        self._raised_before = self._engine.num_raised

    def strike(self) -> None:
        self._engine.arm()

    @property
    def is_pending(self) -> bool:
        return self._engine.num_raised < self._raised_before + 2

    def verify(self) -> str:
        return f"{self.name} ran no step that failed" if self.is_pending else ""


class ResetAll(_ProcessFault):
    """RST of every connection of a process: what is under way is lost, and all have to meet again.

    A control connection that breaks loses its frames; ZeroMQ connects again by itself.
    """

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._hit_before = self._hit
        self._linked_after = 1 - self.is_router
        cluster.events.after(SLACK_S / 100, self._look)

    @property
    def _hit(self) -> int:
        return self.tap.counts["lost by reset"] + self.tap.counts["held"]

    def strike(self) -> None:
        names = [name for name in self.cluster.workers if self.is_router or self._are_linked(name)]
        for name in names if self.is_router else [*names, ROUTER.worker_id]:
            self.cluster.reset_link(self.name, name)

    def _are_linked(self, name: str) -> bool:
        peers = {peer.worker_id for peer, _ in self.cluster.worker(self.name).mesh.linked()}
        return name in peers

    def _look(self) -> None:
        if self.before is not None:
            self._linked_after = len(self.before.mesh.linked())

    def verify(self) -> str:
        if self._linked_after:
            return f"{self.name} still had {self._linked_after} links"
        return "" if self._hit > self._hit_before else f"no frame of {self.name} was lost or held up"


class FullDisk(_ProcessFault):
    """No space left on the disk or in /dev/shm.

    A running process allocates nothing there, so the fault is felt at the next start: the process is killed, and the
    starts after it fail in the creation of the KV pool (of the router's socket, without a file system to refuse it).
    """

    def strike(self) -> None:
        self.cluster.full_starts[self.name] = FULL_STARTS
        if self.is_router:
            self.cluster.kill_router()
        else:
            self.cluster.kill_worker(self.name, tell_router=True)

    def verify(self) -> str:
        refused = self.cluster.refused_starts[self.name]
        if refused != FULL_STARTS:
            return f"{refused} starts of {self.name} found no space, {FULL_STARTS} should"
        return self._why_not_replaced()


# ---- links ----


class _LinkFault(Fault):
    """Something done to the connection of two processes."""

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self.link = frozenset(aim.ends)


class Silence(_LinkFault):
    """The link carries nothing for three seconds, and says nothing about it."""

    lasts_s = SILENCE_S + SLACK_S

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

    lasts_s = BAD_LINK_S

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

    lasts_s = BAD_LINK_S

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

    lasts_s = LATE_S + SLACK_S

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._frame = Repeated(cluster.events, self.link, LATE_S)
        self.tap.follow = lambda crossing: crossing is self._frame.crossing

    def strike(self) -> None:
        self.tap.conditions.append(self._frame)

    @property
    def is_pending(self) -> bool:
        return len(self._arrived) < 2

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


# ---- time ----


class ClockStep(Fault):
    """The wall clock jumps by a minute, forward or back. Nothing but a date in a log line may read it."""

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._wall = SteppedWallClock()

    def strike(self) -> None:
        self._wall.step(CLOCK_STEP_S if self.aim.target is Target.FORWARD else -CLOCK_STEP_S)

    def verify(self) -> str:
        if abs(self._wall.offset_s()) < CLOCK_STEP_S - 1:
            return f"the wall clock is off by {self._wall.offset_s():.1f} s"
        readers = self._wall.readers
        return f"the wall clock was read by {', '.join(sorted(readers))}" if readers else ""

    def close(self) -> None:
        self._wall.close()


# ---- the table ----

MakeFault = Callable[[FaultCluster, Aim, random.Random], Fault]


@dataclass(frozen=True, slots=True)
class Kind:
    """`is_immediate`: it has to be in place before the frame of the moment leaves."""

    name: str
    make: MakeFault
    targets: tuple[Target, ...]
    is_immediate: bool = False


KINDS: tuple[Kind, ...] = (
    Kind("kill -9", Kill, PROCESSES),
    Kind("SIGTERM", Terminate, PROCESSES),
    Kind("SIGSTOP", Stop, PROCESSES),
    Kind("OOM kill", OomKill, PROCESSES),
    Kind("step error", StepError, WORKERS),
    Kind("silence", Silence, LINKS, is_immediate=True),
    Kind("RST", ResetAll, PROCESSES),
    Kind("1 Mbit/s", Bandwidth, LINKS, is_immediate=True),
    Kind("5 % loss", Loss, LINKS, is_immediate=True),
    Kind("corrupt", CorruptFrame, (Target.TRANSFER, Target.BLOCKS, Target.TO_PREFILL, Target.TO_DECODE), True),
    Kind("truncated", TruncatedFrame, LINKS, is_immediate=True),
    Kind("repeated", RepeatedFrame, LINKS, is_immediate=True),
    Kind("clock step", ClockStep, (Target.FORWARD, Target.BACK)),
    Kind("disk full", FullDisk, PROCESSES),
)
