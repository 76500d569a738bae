"""Starts the processes of one cluster on this machine, keeps them alive, and takes them all down again.

Life cycle, on one asyncio loop:

    1. start     every child is started; one that ends before `mark_started` ends everything (StartFailed)
    2. keep      a child that ends is logged with its cause, the router is told, and it is started again after a backoff
    3. drain     `stop`: SIGTERM to the front (the router process; it finishes what runs), then to the workers
    4. kill      a second `stop`, or a drain that takes too long: SIGKILL to what is left

Children have a session of their own, so Ctrl-C reaches the supervisor alone; `deploy.child` makes them die with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.clock import Clock
from .backoff import Backoff
from .child import describe_exit
from .reports import exited_line

WORKER_GRACE_S = 5.0  # a worker has nothing to finish once the front has drained
FRONT_MARGIN_S = 5.0
MAX_REPORT_BYTES = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process to keep. The front reports on its stdout, hears on its stdin, and is drained first."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    is_front: bool = False
    inherited: tuple[int, ...] = ()  # descriptors of the supervisor that the process gets under the same numbers


class StartFailed(Exception):
    """A child ended before the cluster was ready."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"{name} ended during start: {cause}")


class Observer(Protocol):
    """Hears what happens to the children."""

    def reported(self, line: str) -> None:
        """The front wrote a line to its stdout."""
        ...

    def exited(self, name: str, pid: int, cause: str, restart_in_s: float) -> None: ...


class _Child:
    """One spec and its current process."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.backoff = Backoff()
        self.process: asyncio.subprocess.Process | None = None
        self.reader: asyncio.Task[None] | None = None

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def signal(self, number: signal.Signals) -> None:
        """Signal the process; SIGKILL takes its whole session."""
        if not self.is_alive:
            return
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    async def ended(self, timeout_s: float | None = None) -> bool:
        """Wait for the process; False when it still lives after `timeout_s`."""
        if self.process is None:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self.process.wait()
        except TimeoutError:
            return False
        return True


class Supervisor:
    """`run` until `stop`. `log_fd` takes the children's output, but the front's stdout goes to the observer."""

    def __init__(
        self, specs: Sequence[ChildSpec], observer: Observer, clock: Clock, drain_s: float, log_fd: int = 2
    ) -> None:
        self._children = [_Child(spec) for spec in specs]
        self._front = next((child for child in self._children if child.spec.is_front), None)
        self._observer, self._clock, self._log_fd = observer, clock, log_fd
        self._drain_s = drain_s
        self._is_started = False
        self._stopping = asyncio.Event()
        self._killing = asyncio.Event()

    def mark_started(self) -> None:
        """The cluster is ready: from now on a child that ends is started again."""
        self._is_started = True

    def pids(self) -> dict[str, int]:
        """The living children."""
        return {c.spec.name: c.process.pid for c in self._children if c.process is not None and c.is_alive}

    def stop(self) -> None:
        """Drain and end; called again, kill. Safe to call from a signal handler of the loop."""
        (self._killing if self._stopping.is_set() else self._stopping).set()

    async def run(self) -> None:
        """Start everything; return when all has ended after `stop`. Raises StartFailed, with nothing left."""
        try:
            async with asyncio.TaskGroup() as group:
                for child in self._children:
                    group.create_task(self._keep(child))
                group.create_task(self._end_when_asked())
        except* StartFailed as failures:
            raise failures.exceptions[0] from None
        finally:
            await self._kill_all()

    async def _keep(self, child: _Child) -> None:
        while not self._stopping.is_set():
            born = self._clock.now()
            try:
                process = await self._start(child)
            except OSError as err:
                await self._bury(child, 0, f"it cannot be started: {err}", 0.0)
                continue
            if self._stopping.is_set():  # it was not there yet when the others were asked to end
                child.signal(signal.SIGKILL)
            returncode = await process.wait()
            if child.reader is not None:
                await child.reader
            if not self._stopping.is_set():
                await self._bury(child, process.pid, describe_exit(returncode), self._clock.now() - born)

    async def _start(self, child: _Child) -> asyncio.subprocess.Process:
        spec = child.spec
        child.process = process = await asyncio.create_subprocess_exec(
            *spec.argv,
            env=dict(spec.env),
            stdin=asyncio.subprocess.PIPE if spec.is_front else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if spec.is_front else self._log_fd,
            stderr=self._log_fd,
            start_new_session=True,
            pass_fds=spec.inherited,
            limit=MAX_REPORT_BYTES,
        )
        child.reader = asyncio.create_task(self._read_reports(process)) if spec.is_front else None
        return process

    async def _bury(self, child: _Child, pid: int, cause: str, lifetime_s: float) -> None:
        """Tell everyone that this incarnation is over, then wait before the next."""
        if not self._is_started:
            raise StartFailed(child.spec.name, cause)
        delay_s = child.backoff.next_delay(lifetime_s)
        self._observer.exited(child.spec.name, pid, cause, delay_s)
        self._tell_front(exited_line(child.spec.name, pid))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()

    def _tell_front(self, line: str) -> None:
        if self._front is not None and self._front.is_alive:
            assert self._front.process is not None
            assert self._front.process.stdin is not None
            self._front.process.stdin.write(f"{line}\n".encode())

    async def _read_reports(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            self._observer.reported(line.decode(errors="replace").rstrip("\n"))

    async def _end_when_asked(self) -> None:
        await self._stopping.wait()
        async with asyncio.TaskGroup() as group:
            drain = group.create_task(self._drain())
            killing = group.create_task(self._killing.wait())
            await asyncio.wait((drain, killing), return_when=asyncio.FIRST_COMPLETED)
            drain.cancel()
            killing.cancel()
        await self._kill_all()

    async def _drain(self) -> None:
        if self._front is not None:
            self._front.signal(signal.SIGTERM)
            await self._front.ended(self._drain_s + FRONT_MARGIN_S)
        workers = [child for child in self._children if child is not self._front]
        for child in workers:
            child.signal(signal.SIGTERM)
        ended = await asyncio.gather(*(child.ended(WORKER_GRACE_S) for child in workers))
        for child, has_ended in zip(workers, ended, strict=True):
            if not has_ended:
                _log.warning("%s did not end within %g s after SIGTERM; killing it", child.spec.name, WORKER_GRACE_S)

    async def _kill_all(self) -> None:
        for child in self._children:
            child.signal(signal.SIGKILL)
        await asyncio.gather(*(child.ended() for child in self._children))
        await asyncio.gather(*(child.reader for child in self._children if child.reader is not None))
