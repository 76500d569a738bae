from __future__ import annotations

import os
import sys
import threading

import pytest

from penstock.worker.background import NICENESS, in_background


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def niceness_of_a_child() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(niceness()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.skipif(sys.platform != "linux", reason="niceness of a thread is Linux's")
def test_background_work_steps_back_and_the_caller_does_not() -> None:
    before = niceness()
    assert in_background(niceness) == max(before, NICENESS)
    assert in_background(niceness_of_a_child) == max(before, NICENESS)
    assert niceness() == before


def test_background_work_that_fails_raises_here() -> None:
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0)
