"""Faults that are done to a process: the front, a prefill worker or a decode worker."""

from __future__ import annotations

import random

from .fault import SLACK_S, Aim, Fault
from .fault_cluster import FaultCluster
from .sim_worker import HEARTBEAT_S
from .tap import ROUTER

STOP_S = 10.0
FULL_STARTS = 2  # starts that find no space before there is some


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

    @property
    def lasts_s(self) -> float:
        return STOP_S + SLACK_S

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
