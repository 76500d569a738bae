"""All hand-off links of one worker over real sockets.

    accept thread ── a thread for each connection: handshake, then reader of the link
    a dial thread for each peer that is ours to dial: connect, handshake, then reader of the link; again after a pause

Decode dials prefill; of two workers with both roles the one with the smaller id dials. A refused incarnation is not
dialed again.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..core.errors import ConfigError, ProtocolError, TransferFailed
from ..core.ids import WorkerKey
from ..engine.kv_memory import KVMemory
from ..protocol.messages import Fingerprint, Peer, Role
from .bulk import Transport, Unusable
from .effects import LinkEffect, PeerLost, PeerUp
from .handshake import Established, Refused, answer, dial
from .identity import Identity, boot_id
from .link import Mesh, OnEvent
from .linking import dials
from .listener import Listener
from .socket_link import LinkTimes, SocketLink
from .staging import StagingArea
from .transports.owner import OwnerTransport
from .transports.tcp import Rendezvous
from .transports.tls import Tls, TlsFiles
from .transports.wire import shut

logger = logging.getLogger(__name__)

TRANSPORTS = ("shm", "tcp")
_HANDSHAKE_S = 3.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_MAX_KNOCKING = 64  # connections that have not said who they are


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """`transports`: those allowed, the preferred one first, or one alone to force it. `wire_dtype`: `wire_format`.

    Without `digests`, which both ends must agree on, nothing notices bytes that change on the way. `tls` encrypts the
    bytes of tcp.
    """

    transports: tuple[str, ...] = TRANSPORTS
    wire_dtype: str = "lossless"
    digests: bool = True
    tls: TlsFiles | None = None


DEFAULT_SETTINGS, DEFAULT_TIMES = MeshSettings(), LinkTimes()


class SocketMesh(Mesh):
    """A `Mesh` over sockets. `on_event` is called from the links' threads and from `perform`: it must only queue.

    `settings`: what may carry blocks, and in which form; `times`: when a silent peer is given up.
    `memory` must outlive `close`. `owner`: the transport of that name, where workers keep their blocks in one memory.
    """

    def __init__(
        self,
        key: WorkerKey,
        role: Role,
        fingerprint: Fingerprint,
        memory: KVMemory,
        on_event: OnEvent,
        *,
        runtime_dir: Path,
        cluster_key: bytes,
        settings: MeshSettings = DEFAULT_SETTINGS,
        times: LinkTimes = DEFAULT_TIMES,
        host: str = "127.0.0.1",
        owner: OwnerTransport | None = None,
    ) -> None:
        libraries = _open_libraries(settings.transports, key, memory, owner)
        self._me = Identity(
            key,
            role,
            fingerprint,
            settings.transports,
            boot_id(),
            memory,
            StagingArea(memory),
            cluster_key,
            settings.wire_dtype,
            settings.digests,
            Tls(settings.tls) if settings.tls is not None else None,
            libraries,
        )
        self._on_event, self._times = on_event, times
        self._lock = threading.Lock()
        self._links: dict[WorkerKey, SocketLink] = {}
        self._reported: set[WorkerKey] = set()
        self._knocking: set[socket.socket] = set()  # accepted, not yet a link
        self._dialing: dict[WorkerKey, threading.Event] = {}  # peer → set to stop its dial thread
        self._listed: set[WorkerKey] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._rendezvous = Rendezvous()
        self._listener = Listener(runtime_dir, key.worker_id, host, self._accepted)

    # ---- Mesh ----

    @property
    def address(self) -> str:
        return str(self._listener.address)

    @property
    def transports(self) -> list[str]:
        return list(self._me.transports)

    def set_peers(self, peers: list[Peer]) -> None:
        """Dial the new ones that are ours to dial; end what belongs to workers listed before and gone now. A link to
        one that is not ours to dial any more, by its role or our own, stays until it breaks.
        """
        listed = {WorkerKey(peer.worker_id, peer.epoch): peer for peer in peers}
        with self._lock:
            gone = self._listed - listed.keys()
            self._listed = set(listed)
            mine = {key: peer for key, peer in listed.items() if dials(self._me.role, self._me.key.worker_id, peer)}
            stopped = [self._dialing.pop(key) for key in sorted(self._dialing.keys() - mine.keys())]
            links = [self._links[key] for key in sorted(gone & self._links.keys())]
            new = {key: (peer, threading.Event()) for key, peer in mine.items() if key not in self._dialing}
            self._dialing.update({key: stop for key, (_, stop) in new.items()})
        for event in stopped:
            event.set()
        for link in links:
            link.stop("no longer listed by the router")
        for key, (peer, stop) in new.items():
            self._spawn(f"kv-dial-{key}", partial(self._dial, key, peer, stop))

    def set_role(self, role: Role) -> None:
        with self._lock:
            self._me = replace(self._me, role=role)

    def perform(self, effect: LinkEffect) -> None:
        link = self._links.get(effect.peer)
        if link is not None:
            link.perform(effect)

    def linked(self) -> list[tuple[WorkerKey, str]]:
        """Links whose PeerUp is on its way to the worker: what is asked of it because of this list comes behind."""
        with self._lock:
            return sorted((key, link.transport) for key, link in self._links.items() if key in self._reported)

    def drop_links(self) -> None:
        """Break every live link; those that are ours to dial are made anew after a pause."""
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.stop("the link was dropped on request")

    def close(self) -> None:
        """End all links and threads and remove the socket file. Idempotent; not from an `on_event` call."""
        with self._lock:
            self._closed = True
            dialing, self._dialing = self._dialing, {}
            links = list(self._links.values())
            knocking = list(self._knocking)
        self._listener.close()
        for sock in knocking:
            shut(sock)
        for event in dialing.values():
            event.set()
        for link in links:
            link.stop("this worker ends")
        self._join()
        for transport in self._me.libraries.values():
            transport.close()

    @property
    def refused_pushes(self) -> int:
        """Pushes on the live links that fit no accepted ticket, generation or ordinal."""
        with self._lock:
            return sum(link.refused_pushes for link in self._links.values())

    # ---- links ----

    def _run_link(self, established: Established, dialed: bool) -> None:
        """Hold the link until it is over. PeerLost of an older link to the same worker comes before its PeerUp."""
        peer = established.peer
        try:
            link = SocketLink(established, self._me, self._on_event, self._times)
        except TransferFailed:
            established.close()
            raise
        if not self._install(link, dialed):
            established.close()
            return
        _log_link(peer, established)
        self._on_event(PeerUp(peer, link.transport))
        with self._lock:
            self._reported.add(peer)
        try:
            link.run()
        finally:
            with self._lock:
                del self._links[peer]
                self._reported.discard(peer)
            logger.info("hand-off link to %s is over: %s", peer, link.why)
            self._on_event(PeerLost(peer, link.why))
            link.over.set()

    def _install(self, link: SocketLink, dialed: bool) -> bool:
        """Make this the link to its peer; False when the mesh closes, or the peer is not wanted any more."""
        while True:
            with self._lock:
                if self._closed or (dialed and link.peer not in self._dialing):
                    return False
                old = self._links.setdefault(link.peer, link)
            if old is link:
                return True
            old.stop("the peer has opened a newer link")
            old.over.wait(self._times.liveness_s)

    # ---- dialing ----

    def _dial(self, key: WorkerKey, peer: Peer, stop: threading.Event) -> None:
        """Keep a link to `peer` until it refuses or is not listed any more."""
        pause_s = _FIRST_PAUSE_S
        while not stop.is_set():
            started = time.monotonic()
            try:
                self._run_link(dial(self._me, peer, _HANDSHAKE_S), dialed=True)
            except Refused as err:
                logger.warning("no hand-off link to %s, and no more tries: %s", key, err)
                return
            except (OSError, ProtocolError, TransferFailed) as err:
                logger.info("no hand-off link to %s yet: %s", key, err)
            lasted = time.monotonic() - started
            pause_s = _FIRST_PAUSE_S if lasted > _LONGEST_PAUSE_S else min(2 * pause_s, _LONGEST_PAUSE_S)
            stop.wait(pause_s)

    # ---- being dialed ----

    def _accepted(self, sock: socket.socket) -> None:
        with self._lock:
            welcome = not self._closed and len(self._knocking) < _MAX_KNOCKING
            if welcome:
                self._knocking.add(sock)
        if not welcome or not self._spawn("kv-answer", partial(self._answer, sock)):
            sock.close()

    def _answer(self, sock: socket.socket) -> None:
        try:
            established = self._shake_hands(sock)
            if established is not None:
                self._run_link(established, dialed=False)
        except (OSError, ProtocolError, TransferFailed) as err:
            logger.warning("a hand-off connection was turned away: %s", err)

    def _shake_hands(self, sock: socket.socket) -> Established | None:
        try:
            return answer(sock, self._me, self._rendezvous, _HANDSHAKE_S)
        finally:
            with self._lock:
                self._knocking.discard(sock)

    # ---- threads ----

    def _spawn(self, name: str, work: Callable[[], None]) -> bool:
        """Run `work` on a thread that `close` joins; False when the mesh has closed."""
        thread = threading.Thread(target=self._run_thread, args=(work,), name=name)
        with self._lock:
            if self._closed:
                return False
            self._threads.add(thread)
            thread.start()
            return True

    def _run_thread(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _join(self) -> None:
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()


def _open_libraries(
    names: tuple[str, ...], key: WorkerKey, memory: KVMemory, owner: OwnerTransport | None
) -> dict[str, Transport]:
    """Register the memory with every library that may be asked to move it. Raises ConfigError for one that cannot."""
    from .transports.catalog import LIBRARIES, open_transport

    ours: dict[str, Transport] = {} if owner is None else {owner.name: owner}
    unknown = [name for name in names if name not in (*TRANSPORTS, *LIBRARIES, *ours)]
    if unknown or not names:
        raise ConfigError(f"transports {list(names)}: choose from {[*ours, *TRANSPORTS, *LIBRARIES]}")
    try:
        return ours | {name: open_transport(name, memory, key) for name in names if name in LIBRARIES}
    except Unusable as err:
        raise ConfigError(f"transfer.transport: {err}") from err


def _log_link(peer: WorkerKey, link: Established) -> None:
    travels = link.wire_dtype or "blocks as they are"
    text = "hand-off link to %s uses %s (%s); %s; %s"
    logger.info(text, peer, link.transport, link.reason, link.figures, travels)
