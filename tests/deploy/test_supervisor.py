"""The supervisor, with tiny Python programs as children."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

from penstock.core.clock import MonotonicClock
from penstock.deploy.child import child_environment
from penstock.deploy.supervisor import ChildSpec, StartFailed, Supervisor
from penstock.engine.shared_files import SharedFiles

FOREVER = "import signal; signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
FRONT = """
import os, signal, sys, threading
def hear():
    for line in sys.stdin:
        print('heard ' + line.strip(), flush=True)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
threading.Thread(target=hear, daemon=True).start()
print('up', flush=True)
signal.sigwait({signal.SIGTERM})
print('drained', flush=True)
os._exit(0)
"""


class Recorder:
    """An observer whose hearings can be awaited."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.exits: list[tuple[str, int, str, float]] = []
        self._changed = asyncio.Event()

    def reported(self, line: str) -> None:
        self.lines.append(line)
        self._changed.set()

    def exited(self, name: str, pid: int, cause: str, restart_in_s: float) -> None:
        self.exits.append((name, pid, cause, restart_in_s))
        self._changed.set()

    async def until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            self._changed.clear()
            await self._changed.wait()


def spec(name: str, code: str, *, is_front: bool = False) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-S", "-c", code), child_environment(os.environ, {}), is_front)


def supervise(
    specs: list[ChildSpec], scenario: Callable[[Supervisor, Recorder], Awaitable[None]], drain_s: float = 10.0
) -> Recorder:
    """Run a supervisor beside `scenario`, which ends it; afterwards no child may live."""

    async def both() -> Recorder:
        recorder = Recorder()
        supervisor = Supervisor(specs, recorder, MonotonicClock(), drain_s)
        async with asyncio.TaskGroup() as group:
            group.create_task(supervisor.run())
            await scenario(supervisor, recorder)
        assert supervisor.pids() == {}
        return recorder

    return asyncio.run(both())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_stop_drains_the_front_then_ends_the_workers() -> None:
    async def scenario(supervisor: Supervisor, recorder: Recorder) -> None:
        await recorder.until(lambda: "up" in recorder.lines)
        supervisor.mark_started()
        assert set(supervisor.pids()) == {"router", "worker"}
        supervisor.stop()

    recorder = supervise([spec("router", FRONT, is_front=True), spec("worker", FOREVER)], scenario)
    assert recorder.lines == ["up", "drained"]
    assert recorder.exits == []


def test_worker_that_dies_is_started_again_and_the_front_hears_of_it() -> None:
    async def scenario(supervisor: Supervisor, recorder: Recorder) -> None:
        await recorder.until(lambda: "up" in recorder.lines)
        supervisor.mark_started()
        dead = supervisor.pids()["worker"]
        os.kill(dead, signal.SIGKILL)
        await recorder.until(lambda: f"heard exited worker {dead}" in recorder.lines)
        name, pid, cause, delay_s = recorder.exits[0]
        assert (name, pid, delay_s) == ("worker", dead, 0.2)
        assert cause.startswith("killed by SIGKILL")
        os.kill(supervisor.pids()["router"], signal.SIGKILL)
        await recorder.until(lambda: recorder.lines.count("up") == 2)
        assert supervisor.pids()["worker"] != dead
        supervisor.stop()

    supervise([spec("router", FRONT, is_front=True), spec("worker", FOREVER)], scenario)


def test_worker_that_keeps_dying_is_started_with_growing_delays() -> None:
    async def scenario(supervisor: Supervisor, recorder: Recorder) -> None:
        supervisor.mark_started()
        await recorder.until(lambda: len(recorder.exits) == 3)
        supervisor.stop()  # while it waits for the next start

    recorder = supervise([spec("worker", "raise SystemExit(3)")], scenario)
    assert [delay_s for *_, delay_s in recorder.exits] == [0.2, 0.4, 0.8]
    assert {cause for _, _, cause, _ in recorder.exits} == {"exit code 3"}


def test_child_that_ends_during_start_takes_all_down_with_one_error() -> None:
    pids: dict[str, int] = {}

    class Watching(Recorder):
        def reported(self, line: str) -> None:
            pids["router"] = int(line)

    async def start() -> None:
        front = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
        worker = "import sys; sys.stdin.read(); raise SystemExit(7)"
        specs = [spec("router", front, is_front=True), spec("worker", worker)]
        await Supervisor(specs, Watching(), MonotonicClock(), 10.0).run()

    with pytest.raises(StartFailed, match="worker ended during start: exit code 7"):
        asyncio.run(start())
    assert all(not is_alive(pid) for pid in pids.values())


def test_program_that_cannot_be_started_is_a_start_failure() -> None:
    async def start() -> None:
        broken = ChildSpec("worker", ("/nowhere/python",), {})
        await Supervisor([spec("router", FRONT, is_front=True), broken], Recorder(), MonotonicClock(), 10.0).run()

    with pytest.raises(StartFailed, match=r"worker ended during start: .*No such file"):
        asyncio.run(start())


def test_second_stop_kills_what_does_not_end() -> None:
    async def scenario(supervisor: Supervisor, recorder: Recorder) -> None:
        await recorder.until(lambda: "deaf" in recorder.lines)
        supervisor.mark_started()
        supervisor.stop()
        supervisor.stop()

    supervise([spec("router", STUBBORN, is_front=True)], scenario, drain_s=1000)


@pytest.mark.skipif(sys.platform != "linux", reason="pidfds are Linux's")
def test_kill_takes_the_children_of_a_child_along() -> None:
    code = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-S', '-c', 'import signal; signal.pause()'])
print(child.pid, flush=True)
signal.pause()
"""

    async def scenario(supervisor: Supervisor, recorder: Recorder) -> None:
        await recorder.until(lambda: bool(recorder.lines))
        supervisor.stop()
        supervisor.stop()

    recorder = supervise([spec("router", code, is_front=True)], scenario)
    assert ends_soon(int(recorder.lines[0]))


def ends_soon(pid: int) -> bool:
    """Wait for a process that is not our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 20)[0])
    finally:
        os.close(descriptor)


SHARER = """
import mmap, os, signal
blocks, ledger = map(int, os.environ['PENSTOCK_SHARED_POOL'].split(','))
if os.fstat(blocks).st_size == 0:
    os.ftruncate(blocks, 4096)
memory = mmap.mmap(blocks, 4096)
memory[0] += 1
print('life', memory[0], flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")
def test_shared_files_outlive_a_killed_child_and_go_with_the_supervisors_end() -> None:
    before = set(os.listdir("/proc/self/fd"))
    shared = SharedFiles()
    env = child_environment(os.environ, shared.environment())
    sharer = ChildSpec("router", (sys.executable, "-S", "-c", SHARER), env, is_front=True, inherited=shared.fds)

    async def scenario(supervisor: Supervisor, recorder: Recorder) -> None:
        await recorder.until(lambda: "life 1" in recorder.lines)
        supervisor.mark_started()
        os.kill(supervisor.pids()["router"], signal.SIGKILL)
        await recorder.until(lambda: "life 2" in recorder.lines)
        supervisor.stop()
        supervisor.stop()

    supervise([sharer], scenario)
    assert os.pread(shared.fds[0], 1, 0) == b"\x02"
    shared.close()
    assert set(os.listdir("/proc/self/fd")) <= before


SUPERVISOR_PROGRAM = """
import asyncio, os, sys
from penstock.core.clock import MonotonicClock
from penstock.deploy.child import child_environment
from penstock.deploy.supervisor import ChildSpec, Supervisor

CHILD = '''
import os, signal
from penstock.deploy.child import die_with_supervisor
die_with_supervisor()
signal.signal(signal.SIGINT, signal.SIG_DFL)
print(os.getpid(), flush=True)
while True: signal.pause()
'''

class Quiet:
    def reported(self, line): print(line, flush=True)
    def exited(self, *_): pass

spec = ChildSpec('router', (sys.executable, '-c', CHILD), child_environment(os.environ, {}), is_front=True)
asyncio.run(Supervisor([spec], Quiet(), MonotonicClock(), 1.0).run())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals and pidfds are Linux's")
def test_children_die_when_the_supervisor_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR_PROGRAM], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        child = int(supervisor.stdout.readline())
        supervisor.kill()
        assert ends_soon(child), "the child outlived its supervisor"
