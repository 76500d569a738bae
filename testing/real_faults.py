"""The kinds of faults that need no root, done to real processes and to the bytes between them; each proves itself.

What a kind means is in `fault_kinds`. Differences: SIGSTOP and silence last as long as it takes to count as dead, not
ten seconds; the front runs in the driver's own process, so it is struck on virtual time only; the clock is stepped
inside each process, as only root could step the machine's.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

from .fault import SLACK_S, WORKERS, Aim, Target
from .fault_kinds import CLOCK_STEP_S
from .fault_processes import FULL_STARTS
from .process_facts import state_of
from .real_cluster import Kept, RealCluster
from .real_fault import RealFault
from .real_links import RealBandwidth, RealCorrupt, RealLoss, RealRepeated, RealSilence, RealTruncated

STOP_S = 2.5  # longer than every time-out of a worker, a link and a lease
OOM_LIMIT_BYTES = 32 << 20
CGROUP = Path("/sys/fs/cgroup/memory")


# ---- processes ----


class _ProcessFault(RealFault):
    def __init__(self, cluster: RealCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self.kept: Kept = cluster.workers[aim.process]
        self.pid, self._num_exits = self.kept.pid, len(self.kept.exits)

    @property
    def exits(self) -> list[int]:
        """How its processes ended since the moment."""
        return self.kept.exits[self._num_exits :]

    def _why_not_ended_with(self, *codes: int) -> str:
        if self.exits != list(codes):
            return f"{self.kept.name} ended with {self.exits}, {list(codes)} should be"
        return f"{self.kept.name} has the same process" if self.kept.pid == self.pid else ""


class RealKill(_ProcessFault):
    def strike(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def verify(self) -> str:
        return self._why_not_ended_with(-signal.SIGKILL)


class RealTerminate(_ProcessFault):
    def strike(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def verify(self) -> str:
        return self._why_not_ended_with(0)


class RealStop(_ProcessFault):
    def __init__(self, cluster: RealCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._state_at_end, self._lost_before = "", cluster.router.counters.workers_lost

    @property
    def lasts_s(self) -> float:
        return STOP_S + SLACK_S

    def strike(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(STOP_S, self._go_on)

    def _go_on(self) -> None:
        self._state_at_end = state_of(self.pid)
        self.close()

    def close(self) -> None:
        if state_of(self.pid) == "T":
            os.kill(self.pid, signal.SIGCONT)

    def verify(self) -> str:
        if self._state_at_end != "T":
            return f"{self.kept.name} was in state {self._state_at_end!r} before it was to go on"
        if self.exits or self.kept.pid != self.pid:
            return f"{self.kept.name} did not live through it: {self.exits}"
        lost = self.cluster.router.counters.workers_lost - self._lost_before
        return "" if lost else "nobody missed it"


class RealOomKill(_ProcessFault):
    """A memory limit, and more memory than that: the kernel kills. Needs root and cgroup v1."""

    def __init__(self, cluster: RealCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._group = CGROUP / f"penstock-test-{self.pid}"

    def strike(self) -> None:
        self.kept.tells_router = False
        self._group.mkdir()
        (self._group / "memory.limit_in_bytes").write_text(str(OOM_LIMIT_BYTES))
        (self._group / "cgroup.procs").write_text(str(self.pid))
        self.kept.command(f"eat-memory {4 * OOM_LIMIT_BYTES >> 20}")

    @property
    def is_pending(self) -> bool:
        return not self.exits

    def verify(self) -> str:
        control = (self._group / "memory.oom_control").read_text() if self._group.exists() else ""
        if "oom_kill 0" in control or "oom_kill" not in control:
            return f"the kernel killed nobody: {control.split()}"
        return self._why_not_ended_with(-signal.SIGKILL)

    def close(self) -> None:
        if self._group.exists():
            self._group.rmdir()


class RealStepError(_ProcessFault):
    def __init__(self, cluster: RealCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._raised_before = self._raised

    @property
    def _raised(self) -> int:
        return self.kept.last_told("raised") or 0

    def strike(self) -> None:
        self.kept.command("fail-step")

    @property
    def is_pending(self) -> bool:
        return self._raised < self._raised_before + 2

    def verify(self) -> str:
        return f"{self.kept.name} ran no step that failed" if self.is_pending else ""


class RealFullDisk(_ProcessFault):
    def strike(self) -> None:
        (self.cluster.folder / f"{self.kept.name}.full").write_text(str(FULL_STARTS))
        os.kill(self.pid, signal.SIGKILL)

    def verify(self) -> str:
        if self.logged(self.kept.name).count("OSError: [Errno 28]") != FULL_STARTS:
            return f"{self.kept.name} did not run out of space {FULL_STARTS} times"
        return self._why_not_ended_with(-signal.SIGKILL, *[1] * FULL_STARTS)


class RealClockStep(RealFault):
    """Every worker's wall clock jumps at once."""

    def __init__(self, cluster: RealCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        self._seconds = CLOCK_STEP_S if aim.target is Target.FORWARD else -CLOCK_STEP_S
        self._before = {name: kept.last_told("clock_offset_s") or 0.0 for name, kept in cluster.workers.items()}

    def strike(self) -> None:
        for kept in self.cluster.workers.values():
            kept.command(f"step-clock {self._seconds}")
            kept.command("read-clock")

    @property
    def is_pending(self) -> bool:
        return bool(self._unstepped())

    def _unstepped(self) -> list[str]:
        return [
            name
            for name, kept in self.cluster.workers.items()
            if abs((kept.last_told("clock_offset_s") or 0.0) - self._before[name] - self._seconds) > 1
        ]

    def verify(self) -> str:
        if unstepped := self._unstepped():
            return f"the clocks of {unstepped} were not stepped"
        readers = {r for kept in self.cluster.workers.values() for r in kept.last_told("readers") or []}
        return f"the wall clock was read by {sorted(readers)}" if readers else ""


class RealReset(_ProcessFault):
    """Of decode, which dials, the links are those that go through the proxies of all prefill workers."""

    def __init__(self, cluster: RealCluster, aim: Aim, rng: random.Random) -> None:
        super().__init__(cluster, aim, rng)
        names = [aim.prefill] if aim.target is Target.PREFILL else [n for n in cluster.transfer if "prefill" in n]
        self._proxies = [self.kept.control, *(cluster.transfer[name] for name in names)]
        self._before = [proxy.counts.copy() for proxy in self._proxies]

    def strike(self) -> None:
        for proxy in self._proxies:
            proxy.reset_all()

    def verify(self) -> str:
        for proxy, before in zip(self._proxies, self._before, strict=True):
            if proxy.counts["reset"] == before["reset"]:
                return f"no connection of {self.kept.name} was reset"
            if proxy.counts["connections"] == before["connections"]:
                return f"{self.kept.name} did not connect again"
        return "" if "is over" in self.logged(self.kept.name) else f"{self.kept.name} noticed nothing"


MakeRealFault = Callable[[RealCluster, Aim, random.Random], RealFault]

ENDS = (Target.TRANSFER, Target.TO_DECODE)

REAL_FAULTS: dict[str, tuple[MakeRealFault, tuple[Target, ...]]] = {
    "kill -9": (RealKill, WORKERS),
    "SIGTERM": (RealTerminate, WORKERS),
    "SIGSTOP": (RealStop, WORKERS),
    "OOM kill": (RealOomKill, WORKERS),
    "step error": (RealStepError, WORKERS),
    "silence": (RealSilence, ENDS),
    "RST": (RealReset, WORKERS),
    "1 Mbit/s": (RealBandwidth, ENDS),
    "5 % loss": (RealLoss, ENDS),
    "corrupt": (RealCorrupt, ENDS),
    "truncated": (RealTruncated, ENDS),
    "repeated": (RealRepeated, ENDS),
    "clock step": (RealClockStep, (Target.FORWARD, Target.BACK)),
    "disk full": (RealFullDisk, WORKERS),
}


def why_impossible(kind_name: str) -> str:
    """Why this kind cannot be done on this machine; empty when it can."""
    if kind_name != "OOM kill":
        return ""
    if os.geteuid() != 0:
        return "a memory limit needs root"
    writable = os.access(CGROUP, os.W_OK) and (CGROUP / "memory.limit_in_bytes").exists()
    return "" if writable else f"{CGROUP} is no writable memory cgroup"
