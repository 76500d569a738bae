"""Faults of real processes: each is done to one worker of a running cluster, and then seen to have happened."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from ..worker.fault_signal import DROP_LINKS
from .process_facts import is_gone, state_of
from .serving import Serving

VERIFY_S = 5.0
POLL_S = 0.02
DROPPED = "the link was dropped on request"
DAY_S = 86_400


class FaultKind(StrEnum):
    KILL = "kill"  # SIGKILL
    FREEZE = "freeze"  # SIGSTOP, and SIGCONT after a while
    LINK = "link"  # every hand-off link of the worker breaks


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that was seen to have happened: when (monotonic), and where the cluster's log stood."""

    kind: FaultKind
    victim: str
    epoch: str
    pid: int
    at: float
    wall: datetime
    log_offset: int


class NotStruck(AssertionError):
    """The fault did not take place, so nothing that follows proves anything."""


def strike(kind: FaultKind, cluster: Serving, row: dict[str, Any]) -> Struck:
    """Do it to the worker of this status row. Raises NotStruck when it cannot be seen to have happened."""
    pid, name = int(row["pid"]), str(row["worker_id"])
    numbers = {FaultKind.KILL: signal.SIGKILL, FaultKind.FREEZE: signal.SIGSTOP, FaultKind.LINK: DROP_LINKS}
    offset = cluster.log.stat().st_size
    struck = Struck(kind, name, str(row["epoch"]), pid, time.monotonic(), datetime.now(), offset)  # the log's own clock
    os.kill(pid, numbers[kind])
    seen: dict[FaultKind, Callable[[], bool]] = {
        FaultKind.KILL: lambda: is_gone(pid),
        FaultKind.FREEZE: lambda: state_of(pid) == "T",
        FaultKind.LINK: lambda: bool(lines_since(cluster, struck.log_offset, rf" {name} .*{DROPPED}")),
    }
    if not wait_until(seen[kind], VERIFY_S):
        raise NotStruck(f"{kind} of {name} (pid {pid}, state {state_of(pid)!r}) was not seen within {VERIFY_S:g} s")
    return struck


def thaw(struck: Struck) -> None:
    """End a freeze. Raises NotStruck when the process does not go on."""
    os.kill(struck.pid, signal.SIGCONT)
    if not wait_until(lambda: state_of(struck.pid) != "T", VERIFY_S):
        raise NotStruck(f"{struck.victim} (pid {struck.pid}) stays frozen after SIGCONT")


def noticed_after_s(cluster: Serving, struck: Struck) -> float | None:
    """Seconds until the router logged that the victim is lost; None when it never did."""
    lines = lines_since(cluster, struck.log_offset, rf" router .*worker {struck.victim}@{struck.epoch[:6]}\w* lost: ")
    if not lines:
        return None
    stamp = datetime.strptime(lines[0].split()[0], "%H:%M:%S.%f").replace(  # a time of day alone
        year=struck.wall.year, month=struck.wall.month, day=struck.wall.day
    )
    return (stamp - struck.wall).total_seconds() % DAY_S


def wait_until(is_so: Callable[[], bool], timeout_s: float) -> bool:
    """Poll; whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def lines_since(cluster: Serving, offset: int, pattern: str) -> list[str]:
    """Lines of the cluster's log from `offset` (bytes) on that contain the pattern."""
    with cluster.log.open("rb") as file:
        file.seek(offset)
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if re.search(pattern, line)]
