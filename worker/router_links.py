"""The connections to the routers that a worker serves, each with an I/O thread of its own.

The main router's address is in the topology. Others announce themselves by their sockets in the runtime folder,
`router-NAME.sock`: the folder is looked at every LOOK_S, so they may join and leave while the worker runs. Who speaks
is known by the socket, never by what a frame says.
"""

from __future__ import annotations

import logging
import queue
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from ..core.clock import Clock
from ..core.config import ROUTER_NAME
from ..core.errors import ConfigError, ProtocolError
from ..core.ids import MAIN_ROUTER, WorkerKey
from ..kvtransfer.effects import LinkEvent
from ..kvtransfer.link import Mesh
from ..protocol import codec
from ..protocol.messages import FromRouter, FromWorker, Goodbye, Hello, Role, ToRouter
from ..protocol.sockets import WorkerSocket
from .core import Snapshot
from .heartbeat import HeartbeatBuilder
from .routers import MAX_ROUTERS, ROUTER_GONE_S, RouterGone
from .turn_watch import TurnWatch

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.1
LOOK_S = 0.5  # between two looks for new routers
_SOCKET_NAME = re.compile(rf"router-({ROUTER_NAME})\.sock")
Inbox = queue.SimpleQueue[FromRouter | LinkEvent | RouterGone | None]


@dataclass(frozen=True, slots=True)
class Incarnation:
    """Who this process is to its routers. `runtime_dir`: where others than the main one may be found, if anywhere."""

    key: WorkerKey
    role: Role
    router_address: str
    drain_s: float = 60.0
    heartbeat_s: float = HEARTBEAT_S
    runtime_dir: str = ""


class RouterLink:
    """The I/O thread of one router: owns the socket to it."""

    def __init__(
        self,
        who: Incarnation,
        hello: Hello,
        inbox: Inbox,
        mesh: Mesh,
        clock: Clock,
        turns: TurnWatch,
        router: str = MAIN_ROUTER,
        address: str = "",
    ) -> None:
        """`address`: empty for the main router's. Raises ConfigError when it cannot be one."""
        self._who, self._hello, self._inbox, self._mesh, self._clock = who, hello, inbox, mesh, clock
        self._router = router
        self._heartbeat = HeartbeatBuilder(turns, router)
        self._socket = WorkerSocket(address or who.router_address, str(who.key))
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._router_epoch: str | None = None
        self._connected_at = clock.now()  # or when this thread began to try
        self.snapshot: Snapshot | None = None  # replaced as a whole by the loop
        self.is_broken = False
        self._thread = threading.Thread(target=self._run, name=f"io-{router}", daemon=True)
        self._thread.start()

    @property
    def is_gone(self) -> bool:
        """There has been no connection for ROUTER_GONE_S."""
        return self._clock.now() - self._connected_at > ROUTER_GONE_S

    def tell(self, message: ToRouter) -> None:
        """Queue a message for the router; any thread."""
        self._outbox.put(codec.from_worker.encode(FromWorker(*self._who.key, message)))
        self._socket.wake()

    def close(self) -> None:
        """Send what is queued, then end the thread."""
        self._stop.set()
        self._socket.wake()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        next_beat = self._clock.now()
        try:
            while not self._stop.is_set():
                now = self._clock.now()
                if now >= next_beat:
                    self._beat()
                    next_beat = now + self._who.heartbeat_s
                self._socket.poll(max(0.0, next_beat - now))
                self._receive()
                self._flush()
                self._watch()
            self._flush()
        except Exception:
            log.exception("the connection to router %s broke", self._router)
            self.is_broken = True
            self._inbox.put(None)
        finally:
            self._socket.close()

    def _beat(self) -> None:
        if self._router_epoch is None:
            self._send(self._hello)
        else:
            self._send(self._heartbeat.build(self.snapshot, self._mesh.linked()))

    def _send(self, message: ToRouter) -> None:
        self._socket.send(codec.from_worker.encode(FromWorker(*self._who.key, message)))

    def _flush(self) -> None:
        while not self._outbox.empty():
            self._socket.send(self._outbox.get_nowait())

    def _receive(self) -> None:
        while (data := self._socket.recv()) is not None:
            try:
                frame = codec.from_router.decode(data)
            except ProtocolError as error:
                log.warning("a frame from the router is dropped: %s", error)
                continue
            if not self._heartbeat.on_frame(frame):
                continue
            if frame.router_epoch != self._router_epoch:
                self._router_epoch = frame.router_epoch
                self._send(self._hello)
            if frame.router != self._router:
                frame = msgspec.structs.replace(frame, router=self._router)
            self._inbox.put(frame)

    def _watch(self) -> None:
        """A router whose socket has been closed for a while has ended. One that only sleeps keeps it open."""
        if self._socket.is_connected:
            self._connected_at = self._clock.now()
        elif self.is_gone and self._router_epoch is not None:
            self._router_epoch = None
            self._inbox.put(RouterGone(self._router))


class RouterLinks:
    """All of them. The loop's thread owns it."""

    def __init__(
        self, who: Incarnation, hello: Hello, inbox: Inbox, mesh: Mesh, clock: Clock, turns: TurnWatch
    ) -> None:
        self._who, self._clock, self._inbox = who, clock, inbox
        self._open = partial(RouterLink, who, hello, inbox, mesh, clock, turns)
        self._links = {MAIN_ROUTER: self._open(MAIN_ROUTER, who.router_address)}
        self._refused: set[str] = set()
        self._next_look = clock.now()

    def tell(self, message: ToRouter, router: str) -> None:
        """To one router; dropped where it has gone."""
        link = self._links.get(router)
        if link is not None:
            link.tell(message)

    def show(self, snapshot: Snapshot) -> None:
        """What heartbeats say from now on."""
        for link in self._links.values():
            link.snapshot = snapshot

    @property
    def is_broken(self) -> bool:
        return any(link.is_broken for link in self._links.values())

    def look(self) -> None:
        """Open and close connections as routers come and go; at most every LOOK_S."""
        if not self._who.runtime_dir or self._clock.now() < self._next_look:
            return
        self._next_look = self._clock.now() + LOOK_S
        for name in [name for name, link in self._links.items() if name != MAIN_ROUTER and link.is_gone]:
            log.info("router %s has left", name)
            self._links.pop(name).close()
            self._inbox.put(RouterGone(name))  # its thread may not have come to say so
        there = dict(self._find(Path(self._who.runtime_dir)))
        for name in sorted(there.keys() - self._links.keys() - self._refused):
            if _is_listening(there[name]):  # one that was killed has left its socket behind
                self._add(name, f"ipc://{there[name]}")

    def _find(self, folder: Path) -> Iterator[tuple[str, Path]]:
        for path in folder.glob("router-*.sock"):
            found = _SOCKET_NAME.fullmatch(path.name)
            if found is not None:
                yield found[1], path

    def _add(self, name: str, address: str) -> None:
        if len(self._links) >= MAX_ROUTERS:
            log.warning("router %s is not served: there are %d already, the bound", name, len(self._links))
            self._refused.add(name)
            return
        try:
            self._links[name] = self._open(name, address)
        except ConfigError as error:
            log.warning("router %s is not served: %s", name, error)
            self._refused.add(name)
            return
        log.info("router %s has come", name)

    def close(self) -> None:
        """Say goodbye to all of them."""
        for link in self._links.values():
            link.tell(Goodbye())
        for link in self._links.values():
            link.close()


def _is_listening(path: Path) -> bool:
    """Some process takes connections at this Unix socket."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # it has more callers than it takes at once
        except OSError:
            return False
    return True
