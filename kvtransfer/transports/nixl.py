"""NIXL: the destination reads out of the source's registered memory, by RDMA, cuda_ipc or cma, over TCP in software.

    open      make an agent named after the worker's incarnation, register the memory, publish agent and addresses
    connect   add the peer's agent and read a few bytes of it, so that a link is up only if reading works
    receive   read pieces, several spans to a request; the source has nothing to do but let UCX make progress
    close     forget the peer's agent if it has failed; one that works stays for the next link to this incarnation,
              because UCX leaves a connection behind each time an agent is removed and added again

Reading rather than writing: what lands in our memory is what we asked for. Still nothing cancels a read, and a peer
that was frozen answers when it goes on: a read that can be late goes to a buffer of the link and is copied from there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import numpy as np

from ...core.errors import TransferFailed
from ...core.ids import WorkerKey
from ...engine.kv_memory import KVMemory
from ..bulk import Bulk, LinkFacts, Span, Transport
from .library import PIECE_BYTES, decode_offer, encode_offer, region_bytes, require_inside
from .nixl_agent import NixlAgent, Pairs, Region
from .process_group import flat_bytes
from .runs import paired

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_MAX_DESCRIPTORS = 1024  # in one request
_SIGN_BYTES = 8
_NOTICE = b"read"
_LOOKS = 3  # reads that must all be done when they are posted, for a peer to count as read by ourselves
_GRACE_S = 0.5  # for a read that our own process performs, to come to its end after `stop`
# What UCX does in software: with one of these our process writes what is read, and no network card.
_IN_SOFTWARE = {"tcp", "cma", "self", "sm", "shm", "posix", "sysv"}


class NixlOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    metadata: Annotated[bytes, msgspec.Meta(min_length=1, max_length=24 << 10)]
    address: Annotated[int, msgspec.Meta(ge=0)]
    nbytes: Annotated[int, msgspec.Meta(ge=1)]
    kind: Literal["DRAM", "VRAM"]
    device: Annotated[int, msgspec.Meta(ge=0, le=255)]
    sign_address: Annotated[int, msgspec.Meta(ge=0)]  # of the bytes by which the peer is recognised


class NixlTransport(Transport):
    name = "nixl"

    def __init__(self, memory: KVMemory, me: WorkerKey) -> None:
        """Raises Unusable where the library is missing or cannot register `memory`."""
        kind: Literal["DRAM", "VRAM"] = "DRAM" if memory.device is None else "VRAM"
        self._memory, self._kind = memory, kind
        self._region = Region(memory.address, region_bytes(memory), kind, memory.device or 0)
        name = _agent_name(me)
        self._sign = np.frombuffer(_sign(name), np.uint8).copy()
        self._seen = np.zeros_like(self._sign)  # where a peer's sign is read to
        signs = [Region(array.ctypes.data, _SIGN_BYTES) for array in (self._sign, self._seen)]
        self._agent = NixlAgent(name, [self._region, *signs])
        self._seen_region = signs[1]
        self._is_linked: dict[str, bool] = {}  # by agent, for those that the library knows
        self._changed = threading.Condition()

    def offer(self) -> bytes:
        region = self._region
        fields = (region.address, region.nbytes, self._kind, region.device, self._sign.ctypes.data)
        return encode_offer(NixlOffer(self._agent.metadata, *fields))

    def connect(self, facts: LinkFacts, peer_offer: bytes) -> Bulk:
        offer, until = decode_offer(peer_offer, NixlOffer, facts), time.monotonic() + facts.timeout_s
        if offer.nbytes != facts.peer_bytes or offer.kind != self._kind:
            theirs, ours = f"{offer.nbytes} bytes of {offer.kind}", f"{facts.peer_bytes} bytes of {self._kind}"
            raise TransferFailed(f"{facts.peer} offers {theirs}; expected {ours}")
        name = _agent_name(facts.peer)
        is_known = self._take(name, until)
        try:
            if not is_known:
                self._forget_others(facts.peer)
                self._add(name, offer)
            is_at_once = self._read_sign(name, offer, until)
        except (OSError, TransferFailed):
            self._give_back(name, has_failed=True)
            raise
        buffer = None if is_at_once else Buffer(self._agent, self._region)
        return NixlBulk(self._memory, self._agent, name, offer, buffer, lambda failed: self._give_back(name, failed))

    def close(self) -> None:
        self._agent.close()

    def _take(self, name: str, until: float) -> bool:
        """Reserve an agent for one link, when an older one to the same incarnation has been closed; is it known?"""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._is_linked.get(name), until - time.monotonic()):
                raise TransferFailed(f"an older link to NIXL agent {name} is still open")
            is_known = name in self._is_linked
            self._is_linked[name] = True
            return is_known

    def _give_back(self, name: str, has_failed: bool) -> None:
        if has_failed:
            self._remove(name)
        with self._changed:
            if has_failed:
                del self._is_linked[name]
            else:
                self._is_linked[name] = False
            self._changed.notify_all()

    def _add(self, name: str, offer: NixlOffer) -> None:
        added = self._agent.add(offer.metadata)
        if added != name:
            self._remove(added)
            raise TransferFailed(f"expected NIXL agent {name}, was offered {added}")

    def _remove(self, name: str) -> None:
        try:
            self._agent.remove(name)
        except TransferFailed as err:
            logger.debug("%s", err)  # it was never added, or the library has dropped it with the peer

    def _forget_others(self, peer: WorkerKey) -> None:
        """Earlier incarnations of a worker are gone when a new one connects."""
        with self._changed:
            old = [
                name for name, linked in self._is_linked.items() if not linked and _worker_of(name) == peer.worker_id
            ]
            for name in old:
                del self._is_linked[name]
        for name in old:
            self._remove(name)

    def _read_sign(self, name: str, offer: NixlOffer, until: float) -> bool:
        """Read the peer's sign some times. Was it there each time as soon as the read was posted?

        Then our own process copies, as with cma, and a read is over when the library says so. The first read also
        makes the connection, so it does not count.
        """
        sign, at_once = np.frombuffer(_sign(name), np.uint8), []

        def check() -> None:
            if time.monotonic() >= until:
                raise TransferFailed(
                    f"NIXL agent {name} does not answer; is it reachable over {os.environ['UCX_TLS']}?"
                )

        pairs = [(offer.sign_address, self._seen_region.address, _SIGN_BYTES)]
        with self._changed:
            for _ in range(1 + _LOOKS):
                self._seen[:] = 0
                look = lambda: at_once.append(bool(np.array_equal(self._seen, sign)))  # noqa: E731
                self._agent.read(name, pairs, check, self._seen_region, look)
                if not np.array_equal(self._seen, sign):
                    raise TransferFailed(f"what was read from NIXL agent {name} is not its sign")
        return all(at_once[1:]) and set(os.environ["UCX_TLS"].split(",")) <= _IN_SOFTWARE


class Buffer:
    """Memory of a link that reads go to where they may be late."""

    def __init__(self, agent: NixlAgent, like: Region) -> None:
        import torch

        device = "cpu" if like.kind == "DRAM" else f"cuda:{like.device}"
        self._agent, self.bytes = agent, torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device)
        self.region = Region(self.bytes.data_ptr(), PIECE_BYTES, like.kind, like.device)
        agent.register(self.region)

    def close(self, is_abandoned: bool) -> None:
        """What an abandoned read may still write to stays with the agent."""
        if is_abandoned:
            self._agent.keep(self.bytes)
        else:
            self._agent.deregister(self.region)


class NixlBulk(Bulk):
    """Made by `NixlTransport.connect`. `give_back(has failed)` is called once, by `close`."""

    quarantine_s = 0.0  # a late read writes to `buffer` only

    in_parts = True

    def __init__(
        self,
        memory: KVMemory,
        agent: NixlAgent,
        peer: str,
        offer: NixlOffer,
        buffer: Buffer | None,
        give_back: Callable[[bool], None],
    ) -> None:
        self._agent, self._peer, self._offer, self._buffer = agent, peer, offer, buffer
        self._like = Region(memory.address, region_bytes(memory), offer.kind, memory.device or 0)
        self._bytes: torch.Tensor | None = None if buffer is None else flat_bytes(memory)
        self._give_back, self._stopped, self._stopped_at = give_back, threading.Event(), 0.0
        self._has_failed = self._closed = False

    def send(self, spans: Sequence[Span]) -> None:
        """The peer reads by itself."""
        self._check()
        self._agent.expect_reads()

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> None:
        require_inside(list(source), self._offer.nbytes, "the peer's")
        require_inside(list(target), self._like.nbytes, "our")
        for pieces in _requests(source, target):
            self._check()
            if not wanted():
                return
            try:
                self._read(pieces)
            except (OSError, TransferFailed):
                self._has_failed = True
                raise

    def discard(self, source: Sequence[Span]) -> None:
        """Nothing has been sent."""

    def stop(self) -> None:
        if not self._stopped.is_set():
            self._stopped_at = time.monotonic()
            self._stopped.set()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.stop()
        self._bytes = None
        self._give_back(self._has_failed)
        if self._buffer is not None:
            self._buffer.close(self._has_failed)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise TransferFailed("the link is over")

    def _check_at_once(self) -> None:
        """A read that our own process performs ends by itself; only when it does not, it is left."""
        if self._stopped.is_set() and time.monotonic() >= self._stopped_at + _GRACE_S:
            raise TransferFailed("the link is over")

    def _read(self, pieces: Pairs) -> None:
        """Pieces are (offset there, offset here, number of bytes)."""
        base = self._offer.address
        if self._buffer is None:
            pairs = [(base + there, self._like.address + here, nbytes) for there, here, nbytes in pieces]
            self._agent.read(self._peer, pairs, self._check_at_once, self._like)
            return
        ends = np.cumsum([nbytes for _, _, nbytes in pieces]).tolist()
        address = self._buffer.region.address
        pairs = [
            (base + there, address + end - nbytes, nbytes) for (there, _, nbytes), end in zip(pieces, ends, strict=True)
        ]
        self._agent.read(self._peer, pairs, self._check, self._like, notice=_NOTICE)
        self._place(pieces, ends)

    def _place(self, pieces: Pairs, ends: list[int]) -> None:
        import torch

        assert self._bytes is not None
        assert self._buffer is not None
        for (_, here, nbytes), end in zip(pieces, ends, strict=True):
            self._bytes[here : here + nbytes].copy_(self._buffer.bytes[end - nbytes : end])
        if self._like.kind == "VRAM":
            torch.cuda.current_stream(self._like.device).synchronize()


def _requests(source: Sequence[Span], target: Sequence[Span]) -> Iterator[Pairs]:
    """Pieces (offset there, offset here, number of bytes), at most PIECE_BYTES in one request."""
    waiting: list[tuple[int, int, int]] = []
    total = 0
    for there, here, nbytes in paired(source, target, PIECE_BYTES):
        if waiting and (total + nbytes > PIECE_BYTES or len(waiting) == _MAX_DESCRIPTORS):
            yield waiting
            waiting, total = [], 0
        waiting.append((there, here, nbytes))
        total += nbytes
    if waiting:
        yield waiting


def _agent_name(key: WorkerKey) -> str:
    """A restarted worker is another agent: nothing that the library keeps of the old one is used for it."""
    return f"{key.worker_id}@{key.epoch}"


def _worker_of(agent_name: str) -> str:
    return agent_name.rpartition("@")[0]


def _sign(agent_name: str) -> bytes:
    return hashlib.blake2b(agent_name.encode(), digest_size=_SIGN_BYTES, person=b"penstock sign").digest()
