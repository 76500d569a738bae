"""A process that holds ends of bulk links and does what it is told, for tests of the transports.

    python -m penstock.testing.bulk_peer FOLDER      one JSON object a line: {"do": …} in, {"ok": …} or {"error": …} out

What moves bytes may block, so it runs on the two threads of its link: `start` begins it, `wait` tells how it ended.
`testing/bulk_process.py` is the other side of this conversation.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import xxhash

from ..core.errors import ServeError
from ..core.ids import WorkerKey
from ..engine.kv_memory import KVMemory
from ..kvtransfer.bulk import Bulk, LinkFacts, Span, Transport
from ..kvtransfer.transports.catalog import LIBRARIES, open_transport
from .socket_transports import SocketTransport

Command = dict[str, Any]


@dataclass
class End:
    """One worker, as far as a transport sees it."""

    memory: KVMemory  # or a DeviceMemory, which looks alike to a transport
    transport: Transport

    def write(self, data: bytes) -> None:
        if isinstance(self.memory, KVMemory):
            self.memory.region[:] = data
        else:
            self.memory.write(data)

    def read(self) -> bytes | memoryview:
        return self.memory.region if isinstance(self.memory, KVMemory) else self.memory.read()


@dataclass
class Link:
    """A thread for each direction, as the product has."""

    bulk: Bulk
    threads: dict[str, ThreadPoolExecutor] = field(
        default_factory=lambda: {way: ThreadPoolExecutor(1, f"bulk-{way}") for way in ("send", "receive")}
    )


class Peer:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ends: dict[str, End] = {}
        self._links: dict[str, Link] = {}
        self._jobs: dict[str, Future[float]] = {}
        self._connecting = ThreadPoolExecutor(2, "bulk-connect")

    def do(self, command: Command) -> object:
        name = f"do_{command.pop('do')}"
        return getattr(self, name)(**command)

    # ---- workers ----

    def do_open(self, end: str, transport: str, nbytes: int, epoch: str, device: int | None = None) -> str:
        """The offer of a new worker with a memory of its own, in base64."""
        memory, key = _make_memory(nbytes, device), WorkerKey(end, epoch)
        try:
            made = (
                open_transport(transport, memory, key)
                if transport in LIBRARIES
                else SocketTransport(transport, memory, key, self._folder)
            )
        except ServeError:
            memory.close()
            raise
        self._ends[end] = End(memory, made)
        return base64.b64encode(made.offer()).decode()

    def do_fill(self, end: str, seed: int) -> None:
        mine = self._ends[end]
        mine.write(random.Random(seed).randbytes(mine.memory.nbytes))

    def do_digest(self, end: str) -> str:
        return xxhash.xxh3_64_hexdigest(self._ends[end].read())

    def do_shut(self, end: str) -> None:
        gone = self._ends.pop(end)
        gone.transport.close()
        del gone.transport
        gone.memory.close()

    # ---- links ----

    def do_connect(
        self,
        end: str,
        link: str,
        job: str,
        peer: tuple[str, str],
        session: str,
        is_dialer: bool,
        offer: str,
        timeout_s: float = 10.0,
        peer_bytes: int = 0,
    ) -> None:
        """Both ends connect at the same time, perhaps in one process: so this is a job, too."""
        mine = self._ends[end]
        nbytes = peer_bytes or mine.memory.nbytes
        facts = LinkFacts(WorkerKey(end, "-"), WorkerKey(*peer), bytes.fromhex(session), is_dialer, nbytes, timeout_s)

        def connect() -> None:
            self._links[link] = Link(mine.transport.connect(facts, base64.b64decode(offer)))

        self._jobs[job] = self._connecting.submit(_timed, connect)

    def do_start(
        self,
        link: str,
        job: str,
        what: str,
        source: list[tuple[int, int]],
        target: list[tuple[int, int]] | None = None,
        wanted: int = 1 << 30,
    ) -> None:
        """`wanted`: how often `wanted` says yes."""
        bulk, asked = self._links[link].bulk, iter(range(wanted))
        spans = [Span(*span) for span in source]
        works: dict[str, Callable[[], object]] = {
            "send": lambda: bulk.send(spans),
            "discard": lambda: bulk.discard(spans),
            "receive": lambda: bulk.receive(
                spans, [Span(*span) for span in target or source], lambda: next(asked, None) is not None
            ),
        }
        thread = self._links[link].threads["send" if what == "send" else "receive"]
        self._jobs[job] = thread.submit(_timed, works[what])

    def do_wait(self, job: str, timeout_s: float = 30.0) -> float:
        """Seconds the job took; raises what it raised."""
        return self._jobs.pop(job).result(timeout_s)

    def do_stop(self, link: str) -> float:
        """Stop the link from this thread; seconds until both of its threads are free."""
        started = time.monotonic()
        self._links[link].bulk.stop()
        for thread in self._links[link].threads.values():
            thread.submit(int).result(30.0)
        return time.monotonic() - started

    def do_close(self, link: str) -> None:
        gone = self._links.pop(link, None)
        if gone is None:
            return
        gone.bulk.stop()
        for thread in gone.threads.values():
            thread.shutdown()
        gone.bulk.close()
        gone.bulk.close()

    # ---- the process ----

    def do_counts(self) -> dict[str, int]:
        gc.collect()
        return {
            "fds": len(os.listdir("/proc/self/fd")),
            "maps": len(Path("/proc/self/maps").read_text().splitlines()),
            "threads": threading.active_count(),
            "tasks": len(os.listdir("/proc/self/task")),
        }

    def do_idle(self, seconds: float) -> float:
        """Processor seconds of all threads while this one waits."""
        before = time.process_time()
        threading.Event().wait(seconds)
        return time.process_time() - before

    def do_quit(self) -> None:
        self._connecting.shutdown()
        for link in list(self._links):
            self.do_close(link)
        for end in list(self._ends):
            self.do_shut(end)


def _make_memory(nbytes: int, device: int | None) -> KVMemory:
    if device is None:
        return KVMemory(nbytes // 4096, 1, 4096)
    from .device_memory import DeviceMemory

    return cast(KVMemory, DeviceMemory(nbytes, device))


def _timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def main() -> None:
    # Libraries print to standard output; what is said to the test goes to a descriptor that they do not know.
    says = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = Peer(Path(sys.argv[1]))
    is_over = False
    try:
        _converse(peer, says)
        is_over = True
    finally:
        if not is_over:
            # Threads of transports that nobody closes any more would keep the process.
            traceback.print_exc()
            os._exit(1)


def _converse(peer: Peer, says: TextIO) -> None:
    for line in sys.stdin:
        command = json.loads(line)
        is_last = command["do"] == "quit"
        try:
            answer: dict[str, object] = {"ok": peer.do(command)}
        except (OSError, ServeError) as err:
            answer = {"error": f"{type(err).__name__}: {err}"}
        says.write(json.dumps(answer) + "\n")
        says.flush()
        if is_last:
            return


if __name__ == "__main__":
    main()
