"""The fourteen kinds of faults of the fault matrix, and what each of them strikes.

Where a kind has no meaning of its own on simulated wires it is replaced by what can be observed of it; the docstring of
its class says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .fault import LINKS, PROCESSES, WORKERS, Aim, Fault, Target
from .fault_clock import SteppedWallClock
from .fault_cluster import FaultCluster
from .fault_frames import Bandwidth, CorruptFrame, Loss, RepeatedFrame, Silence, TruncatedFrame
from .fault_processes import FullDisk, Kill, OomKill, ResetAll, StepError, Stop, Terminate

CLOCK_STEP_S = 60.0


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
