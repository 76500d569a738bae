"""Exit causes, and a child that looks for its supervisor."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from penstock.deploy.backoff import Backoff
from penstock.deploy.child import SUPERVISOR_PID, child_environment, describe_exit


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-9, "killed by SIGKILL (by hand, or by the system because memory ran out)"),
        (-11, "killed by SIGSEGV"),
        (-200, "killed by signal 200"),
    ],
)
def test_exit_cause_is_named_for_people(returncode: int, words: str) -> None:
    assert describe_exit(returncode) == words


def test_backoff_doubles_to_its_bound_and_starts_over_after_a_long_life() -> None:
    backoff = Backoff()
    assert [backoff.next_delay(0.0) for _ in range(7)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert backoff.next_delay(30.0) == 0.2
    assert backoff.next_delay(1.0) == 0.4


def test_child_environment_names_the_supervisor_and_keeps_the_rest() -> None:
    environment = child_environment({"A": "1", "B": "2"}, {"B": "3"})
    assert (environment["A"], environment["B"], environment[SUPERVISOR_PID]) == ("1", "3", str(os.getpid()))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread watches for the supervisor's end")
def test_child_whose_supervisor_is_already_gone_ends_at_once() -> None:
    code = "from penstock.deploy.child import die_with_supervisor as d; d(); print('lives')"
    for pid, output in ((1, ""), (os.getpid(), "lives\n")):
        environment = {**os.environ, SUPERVISOR_PID: str(pid)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.returncode) == (output, 0 if output else 1)


def test_process_without_a_supervisor_is_left_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if name != SUPERVISOR_PID}
    code = "from penstock.deploy.child import *; die_with_supervisor(); print(is_supervised())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"
