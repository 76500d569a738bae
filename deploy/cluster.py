"""One cluster on this machine, from its topology to its end: supervisor, signals, and what people hear about it."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..core.clock import Clock
from ..core.config import Topology, dump_topology
from ..engine.shared_files import SharedFiles
from .launch import child_specs
from .reports import ClusterReady, Listening, Report, decode_report
from .runtime_dir import TOPOLOGY_FILE
from .supervisor import Supervisor

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChildExited:
    """A process ended by itself and is started again."""

    name: str
    pid: int
    cause: str
    restart_in_s: float


@dataclass(frozen=True, slots=True)
class Stopping:
    """Running requests finish; a second signal ends them."""


News = Report | ChildExited | Stopping


class Audience(Protocol):
    """Who is told how the cluster fares."""

    def tell(self, news: News) -> None: ...


class Cluster:
    """`run` until SIGINT or SIGTERM. Raises StartFailed when a process ends before the cluster is ready."""

    def __init__(
        self, topology: Topology, runtime_dir: Path, audience: Audience, clock: Clock, log_fd: int = 2
    ) -> None:
        self._topology, self._runtime_dir, self._audience = topology, runtime_dir, audience
        self._save()
        self._shared = SharedFiles() if topology.transfer.one_pool else None
        specs = child_specs(topology, runtime_dir, shared=self._shared)
        self.supervisor = Supervisor(specs, self, clock, topology.gateway.drain_s, log_fd)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        try:
            await self.supervisor.run()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            if self._shared is not None:
                self._shared.close()

    def stop(self) -> None:
        self._audience.tell(Stopping())
        self.supervisor.stop()

    def reported(self, line: str) -> None:
        report = decode_report(line)
        if report is None:
            _log.info("router: %s", line)
            return
        if isinstance(report, Listening):
            self._keep_port(report.port)
        if isinstance(report, ClusterReady):
            self.supervisor.mark_started()
        self._audience.tell(report)

    def exited(self, name: str, pid: int, cause: str, restart_in_s: float) -> None:
        _log.warning("%s (pid %s) ended: %s; starts again in %g s", name, pid, cause, restart_in_s)
        self._audience.tell(ChildExited(name, pid, cause, restart_in_s))

    def _keep_port(self, port: int) -> None:
        """A port that the system chose stays the same when the front is started again."""
        if self._topology.gateway.port != port:
            self._topology = replace(self._topology, gateway=replace(self._topology.gateway, port=port))
            self._save()

    def _save(self) -> None:
        dump_topology(self._topology, self._runtime_dir / TOPOLOGY_FILE)
