"""Work that may take its time: on a thread to which the kernel gives what the others leave."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

NICENESS = 10


def in_background(work: Callable[[], T]) -> T:
    """The result of `work`, computed on a thread of low priority, as are the threads that it starts; raises what it
    raises.

    A worker that starts again loads its model beside those that have just taken over its streams.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="background", initializer=_step_back) as pool:
        return pool.submit(work).result()


def _step_back() -> None:
    """On Linux each thread has a niceness of its own, which its children inherit; elsewhere it is the process's."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
