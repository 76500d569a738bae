"""The end of a worker's process is noticed without its silence and without the supervisor."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from penstock.core.ids import WorkerKey
from penstock.protocol import codec
from penstock.protocol.messages import Fingerprint, FromWorker, Heartbeat, Hello, WorkerLoad
from penstock.router.config import RouterConfig
from penstock.router.process_watch import ProcessWatch
from penstock.router.service import RouterService

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system has no pidfd")

KEY = WorkerKey("d0", "0" * 16)
SLEEP = [sys.executable, "-c", "import sys; sys.stdin.read()"]
HELLO = Hello("both", 1, Fingerprint("tiny", "w", "float32", 1, 1, 4, 4, "block-major"), 100, 1000, 64, "/kv", ["shm"])
WORKER = """
import sys
from penstock.protocol.sockets import WorkerSocket
socket = WorkerSocket(sys.argv[1], sys.argv[2])
for frame in sys.argv[3:]:
    socket.send(bytes.fromhex(frame))
sys.stdin.read()
"""


@pytest.fixture
def child():
    """A process that waits to be killed."""
    with subprocess.Popen(SLEEP, stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def run(body):
    async def main():
        async with asyncio.timeout(60):
            await body()

    asyncio.run(main())


def test_killed_process_is_reported_once(child):
    async def body():
        ended: asyncio.Queue[WorkerKey] = asyncio.Queue()
        watch = ProcessWatch(ended.put_nowait)
        watch.add(KEY, child.pid)
        watch.add(KEY, child.pid)
        child.kill()
        assert await ended.get() == KEY
        watch.close()
        assert ended.empty()

    run(body)


def test_process_that_is_gone_already_is_reported(child):
    async def body():
        ended: asyncio.Queue[WorkerKey] = asyncio.Queue()
        watch = ProcessWatch(ended.put_nowait)
        watch.add(KEY, child.pid)
        assert await ended.get() == KEY

    child.kill()
    child.wait()
    run(body)


def test_process_out_of_sight_is_not_watched_and_close_forgets_all(child):
    async def body():
        ended: asyncio.Queue[WorkerKey] = asyncio.Queue()
        watch = ProcessWatch(ended.put_nowait)
        before = os.listdir("/proc/self/fd")
        watch.add(KEY, None)
        assert os.listdir("/proc/self/fd") == before
        watch.add(KEY, child.pid)
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
        watch.close()
        watch.close()
        assert os.listdir("/proc/self/fd") == before
        child.kill()
        child.wait()
        await asyncio.sleep(0)
        assert ended.empty()

    run(body)


def test_service_loses_a_killed_worker_long_before_its_silence(tmp_path):
    address = f"ipc://{tmp_path}/r.sock"
    beat = Heartbeat(2, "ready", WorkerLoad(100, 100), [], [])
    frames = [codec.from_worker.encode(FromWorker(*KEY, message)).hex() for message in (HELLO, beat)]

    async def body():
        service = RouterService(RouterConfig(worker_timeout_s=3600), address)
        await service.start()
        await until(lambda: service.status().ready)
        worker.kill()
        await until(lambda: not service.status().ready)
        assert service.status().workers[0].state == "lost"
        assert service.counters.workers_lost == 1
        await service.stop()

    with subprocess.Popen([sys.executable, "-c", WORKER, address, str(KEY), *frames], stdin=subprocess.PIPE) as worker:
        run(body)


async def until(is_so):
    while not is_so():  # noqa: ASYNC110  # the service has no event for it
        await asyncio.sleep(0.01)
