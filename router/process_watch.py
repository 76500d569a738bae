"""Notice at once that a worker's process has ended: the kernel marks its pidfd readable, whoever its parent is.

A pidfd names one process for good, so a pid that is given to another one later cannot mislead. Where the system has no
pidfds, or the worker is not in sight, nothing is watched and silence tells.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from ..core.ids import WorkerKey

MAX_WATCHED = 4096
LAST_WORDS_S = 0.05  # what it sent before its end waits in the socket and comes first

log = logging.getLogger(__name__)


class ProcessWatch:
    """Calls `on_end(key)` from the running loop, once for each incarnation. `close` when the loop is done."""

    def __init__(self, on_end: Callable[[WorkerKey], None]) -> None:
        self._on_end = on_end
        self._pidfds: dict[WorkerKey, int] = {}
        self._ending: dict[WorkerKey, asyncio.TimerHandle] = {}

    def add(self, key: WorkerKey, pid: int | None) -> None:
        """Watch the process of `key`; a second time changes nothing."""
        if pid is None or key in self._pidfds or key in self._ending or len(self._pidfds) >= MAX_WATCHED:
            return
        if not hasattr(os, "pidfd_open"):
            return
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._end_soon(key)
            return
        except OSError as error:
            log.warning("worker %s: process %d cannot be watched, silence will tell: %s", key, pid, error)
            return
        self._pidfds[key] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._ended, key)

    def close(self) -> None:
        """Watch nothing any more. Safe twice."""
        for key in list(self._pidfds):
            self._forget(key)
        for timer in self._ending.values():
            timer.cancel()
        self._ending.clear()

    def _ended(self, key: WorkerKey) -> None:
        self._forget(key)
        self._end_soon(key)

    def _forget(self, key: WorkerKey) -> None:
        pidfd = self._pidfds.pop(key)
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)

    def _end_soon(self, key: WorkerKey) -> None:
        self._ending[key] = asyncio.get_running_loop().call_later(LAST_WORDS_S, self._report, key)

    def _report(self, key: WorkerKey) -> None:
        del self._ending[key]
        self._on_end(key)
