"""What the supervisor passes to a child, and how a child makes sure that it never outlives the supervisor."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Mapping

SUPERVISOR_PID = "PENSTOCK_SUPERVISOR_PID"  # set in the environment of every supervised child
_PR_SET_PDEATHSIG = 1


def child_environment(base: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child of this process: `base`, then `extra`, and who its supervisor is."""
    return {**base, **extra, SUPERVISOR_PID: str(os.getpid()), "PYTHONUNBUFFERED": "1"}


def is_supervised() -> bool:
    return SUPERVISOR_PID in os.environ


def die_with_supervisor() -> None:
    """In a supervised child: arrange that the kernel kills this process when the supervisor ends, however it ends.

    Called first thing. A supervisor that is gone already is noticed here; without a supervisor nothing happens.
    """
    expected = os.environ.get(SUPERVISOR_PID)
    if expected is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(expected):
            os._exit(1)
    else:
        threading.Thread(target=_watch_parent, args=(int(expected),), daemon=True, name="supervisor-watch").start()


def _watch_parent(expected: int) -> None:
    """No death signal on this system, so the parent's id is compared once a second: it changes when the parent ends."""
    tick = threading.Event()
    while os.getppid() == expected:
        tick.wait(1.0)
    os._exit(1)


def describe_exit(returncode: int) -> str:
    """How a process ended, for people: `exit code 3`, `killed by SIGKILL (…)`."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    reason = " (by hand, or by the system because memory ran out)" if returncode == -signal.SIGKILL else ""
    return f"killed by {name}{reason}"
