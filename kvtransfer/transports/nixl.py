"""NIXL: the destination reads out of the source's registered memory, by RDMA, cuda_ipc or cma, over TCP in software.

    open      make an agent named after the worker's incarnation, register the memory, publish agent and addresses
    connect   both ends add the other's agent and read a few bytes, so that a link is up only if reading works
    receive   read pieces, several spans to a request; the source has nothing to do but let UCX make progress
    close     remove the peer's agent, one peer at a time: two threads doing so at once have crashed the library

Reading rather than writing: what lands in our memory is what we asked for, so a peer that is late, restarted or lost
cannot write into blocks that have a new owner.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np

from ...core.errors import TransferFailed
from ...core.ids import WorkerKey
from ...engine.kv_memory import KVMemory
from ..bulk import Bulk, LinkFacts, Span, Transport
from .library import PIECE_BYTES, decode_offer, encode_offer, require_inside
from .nixl_agent import NixlAgent, Pairs
from .runs import paired

logger = logging.getLogger(__name__)

_MAX_DESCRIPTORS = 1024  # in one request
_PROBE_BYTES = 8
# Over these our own process writes what it reads, and none of it writes after the peer's agent has been removed.
_IN_SOFTWARE = {"tcp", "cma", "self", "sm", "shm", "posix", "sysv"}
_HARDWARE_QUARANTINE_S = 1.0


class NixlOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    metadata: Annotated[bytes, msgspec.Meta(min_length=1, max_length=24 << 10)]
    address: Annotated[int, msgspec.Meta(ge=0)]
    nbytes: Annotated[int, msgspec.Meta(ge=1)]
    kind: Literal["DRAM", "VRAM"]


class NixlTransport(Transport):
    name = "nixl"

    def __init__(self, memory: KVMemory, me: WorkerKey) -> None:
        """Raises Unusable where the library is missing or cannot register `memory`."""
        self._memory, self._me = memory, me
        self._kind: Literal["DRAM", "VRAM"] = "DRAM" if memory.device is None else "VRAM"
        # Where the first few bytes of a peer are read to; host memory has room for it outside the pool.
        self._probe = np.zeros(_PROBE_BYTES, np.uint8)
        regions = [(memory.address, len(memory.region), memory.device or 0)]
        if self._kind == "DRAM":
            regions.append((self._probe.ctypes.data, _PROBE_BYTES, 0))
        self._agent = NixlAgent(_agent_name(me), self._kind, regions)
        self._linked: set[str] = set()
        self._unlinked = threading.Condition()

    def offer(self) -> bytes:
        memory = self._memory
        return encode_offer(NixlOffer(self._agent.metadata, memory.address, len(memory.region), self._kind))

    def connect(self, facts: LinkFacts, peer_offer: bytes) -> Bulk:
        offer, until = decode_offer(peer_offer, NixlOffer, facts), time.monotonic() + facts.timeout_s
        if offer.nbytes != facts.peer_bytes or offer.kind != self._kind:
            theirs, ours = f"{offer.nbytes} bytes of {offer.kind}", f"{facts.peer_bytes} bytes of {self._kind}"
            raise TransferFailed(f"{facts.peer} offers {theirs}; expected {ours}")
        name = _agent_name(facts.peer)
        self._reserve(name, until)
        try:
            added = self._agent.add(offer.metadata)
            if added != name:
                self._agent.remove(added)
                raise TransferFailed(f"expected NIXL agent {name}, {facts.peer} offers {added}")
            self._try_reading(name, offer, until)
        except (OSError, TransferFailed):
            self._disconnect(name)
            raise
        return NixlBulk(self._memory, self._agent, name, offer, lambda: self._disconnect(name))

    def close(self) -> None:
        self._agent.close()

    def _reserve(self, name: str, until: float) -> None:
        """One link to an agent at a time: wait until an older one to the same incarnation has been closed."""
        with self._unlinked:
            if not self._unlinked.wait_for(lambda: name not in self._linked, until - time.monotonic()):
                raise TransferFailed(f"an older link to NIXL agent {name} is still open")
            self._linked.add(name)

    def _disconnect(self, name: str) -> None:
        try:
            self._agent.remove(name)
        except TransferFailed as err:
            logger.debug("%s", err)  # it was never added, or the library has dropped it with the peer
        with self._unlinked:
            self._linked.discard(name)
            self._unlinked.notify_all()

    def _try_reading(self, name: str, offer: NixlOffer, until: float) -> None:
        if self._kind == "VRAM":
            return

        def check() -> None:
            if time.monotonic() >= until:
                raise TransferFailed(
                    f"NIXL agent {name} does not answer; is it reachable over {os.environ['UCX_TLS']}?"
                )

        nbytes = min(_PROBE_BYTES, offer.nbytes)
        self._agent.read(name, [(offer.address, self._probe.ctypes.data, nbytes)], check)


class NixlBulk(Bulk):
    """Made by `NixlTransport.connect`. `disconnect` is called once, by `close`."""

    is_reader = True

    def __init__(
        self, memory: KVMemory, agent: NixlAgent, peer: str, offer: NixlOffer, disconnect: Callable[[], None]
    ) -> None:
        self._memory, self._agent, self._peer, self._offer = memory, agent, peer, offer
        self._address, self._nbytes = memory.address, len(memory.region)
        self._disconnect, self._stopped, self._closed = disconnect, threading.Event(), False
        self.quarantine_s = 0.0 if _is_in_software(os.environ.get("UCX_TLS", "all")) else _HARDWARE_QUARANTINE_S

    def send(self, spans: Sequence[Span]) -> None:
        """The peer reads by itself."""
        self._check()
        self._agent.expect_reads()

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> None:
        require_inside(list(source), self._offer.nbytes, "the peer's")
        require_inside(list(target), self._nbytes, "our")
        for pairs in self._requests(source, target):
            self._check()
            if not wanted():
                return
            self._agent.read(self._peer, pairs, self._check)

    def discard(self, source: Sequence[Span]) -> None:
        """Nothing has been sent."""

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stopped.set()
            self._disconnect()

    def _check(self) -> None:
        if self._stopped.is_set():
            raise TransferFailed("the link is over")

    def _requests(self, source: Sequence[Span], target: Sequence[Span]) -> Iterator[Pairs]:
        """Pieces of at most PIECE_BYTES together."""
        waiting: list[tuple[int, int, int]] = []
        nbytes = 0
        for theirs, ours, length in paired(source, target, PIECE_BYTES):
            if waiting and (nbytes + length > PIECE_BYTES or len(waiting) == _MAX_DESCRIPTORS):
                yield waiting
                waiting, nbytes = [], 0
            waiting.append((self._offer.address + theirs, self._address + ours, length))
            nbytes += length
        if waiting:
            yield waiting


def _agent_name(key: WorkerKey) -> str:
    """A restarted worker is another agent: nothing that the library keeps of the old one is used for it."""
    return f"{key.worker_id}@{key.epoch}"


def _is_in_software(ucx_tls: str) -> bool:
    return set(ucx_tls.split(",")) <= _IN_SOFTWARE
