"""A torch process group of two for each link: gloo for memory on the CPU, nccl for memory on a GPU.

    open      a store on loopback, through which the two ends of a link find each other; its address is the offer
    connect   both ends make the group, the listener with rank 0 in its own store, and exchange a few bytes
    send      a message for each piece, matched by order
    stop      nccl: abort. gloo cannot, but a receive that times out closes its connections: such a one is posted. Who
              waits for a message of which a part has come is not told even then, so a thread of the link waits for gloo

Neither library notices a frozen peer, and neither authenticates: the store and gloo listen on the given address only.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ...core.errors import TransferFailed
from ...core.ids import WorkerKey
from ...engine.kv_memory import KVMemory
from ..bulk import Bulk, LinkFacts, Span, Transport, Unusable
from .library import PIECE_BYTES, decode_offer, encode_offer, library_errors, region_bytes, require_inside
from .runs import chunks, total_bytes

if TYPE_CHECKING:
    import torch

_PATIENCE = timedelta(seconds=30)  # for one piece; the link's own liveness ends it much earlier
_STORE_PATIENCE = timedelta(seconds=5)
_AT_ONCE = timedelta(milliseconds=1)
_DATA, _NEVER_SENT = 0, 1  # tags
_SENDING, _RECEIVING = 0, 1
_CLOSE_S = 0.2
_LOOK_S = 0.0002
GPU_HELP = "it needs a CUDA device and pip install 'penstock[gpu]'"


class StoreOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    backend: str


class ProcessGroupTransport(Transport):
    """`name` is "gloo" or "nccl". `host`: an address of this worker that its peers reach."""

    def __init__(self, name: str, memory: KVMemory, me: WorkerKey, host: str = "127.0.0.1") -> None:
        """Raises Unusable where torch has no such backend, or the memory is not where the backend needs it."""
        self.name, self._memory, self._host = name, memory, host
        _require_backend(name, memory)
        with library_errors(f"{name}: opening a store on {host}"):
            self._store, self._port = _open_store(host)

    def offer(self) -> bytes:
        return encode_offer(StoreOffer(self._host, self._port, self.name))

    def connect(self, facts: LinkFacts, peer_offer: bytes) -> Bulk:
        offer, until = decode_offer(peer_offer, StoreOffer, facts), time.monotonic() + facts.timeout_s
        if offer.backend != self.name:
            raise TransferFailed(f"{facts.peer} offers {offer.backend}; expected {self.name}")
        with library_errors(f"{self.name}: making a group with {facts.peer}"):
            store = _dial_store(offer, facts) if facts.is_dialer else self._store
            group = self._make_group(store, facts)
        bulk = ProcessGroupBulk(self.name, self._memory, group, peer=0 if facts.is_dialer else 1)
        try:
            bulk.greet(max(0.001, until - time.monotonic()))
        except TransferFailed:
            bulk.close()
            raise
        return bulk

    def close(self) -> None:
        self._store = None

    def _make_group(self, store: Any, facts: LinkFacts) -> Any:
        dist = _distributed()
        shared = dist.PrefixStore(facts.session.hex(), store)
        me, patience = (1 if facts.is_dialer else 0), timedelta(seconds=facts.timeout_s)
        if self.name == "nccl":
            return dist.ProcessGroupNCCL(shared, me, 2, patience)
        options: Any = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = patience
        return dist.ProcessGroupGloo(shared, me, 2, options)


class ProcessGroupBulk(Bulk):
    """Made by `ProcessGroupTransport.connect`. `peer`: its rank."""

    quarantine_s = 0.0  # a closed connection takes no more bytes, and an aborted communicator runs no more kernels
    in_parts = False

    def __init__(self, name: str, memory: KVMemory, group: Any, peer: int) -> None:
        self._name, self._group, self._peer = name, group, peer
        self._bytes: torch.Tensor | None = flat_bytes(memory)
        self._stopped: Future[None] = Future()
        self._stopping = threading.Lock()
        self._waiters = [Waiter(self._stopped) for _ in range(2)]  # for sending and for receiving

    def greet(self, timeout_s: float) -> None:
        """Exchange a few bytes with the peer, which makes the connection."""
        import torch

        mine, theirs = torch.ones(8, dtype=torch.uint8, device=self._whole.device), self._buffer(8)
        with self._working("greeting"):
            sent, heard = self._send(mine), self._receive(theirs)
            self._settle(heard, _RECEIVING, timedelta(seconds=timeout_s))
            self._settle(sent, _SENDING, timedelta(seconds=timeout_s))
        if not torch.equal(mine, theirs):
            raise TransferFailed(f"{self._name}: the peer greets with other bytes")

    def send(self, spans: Sequence[Span]) -> None:
        import torch

        for piece in self._cut(spans):
            with self._working("sending"):
                views = [self._view(span) for span in piece]
                self._settle(self._send(views[0] if len(views) == 1 else torch.cat(views)), _SENDING)

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> None:
        left = total_bytes(source)
        for piece in self._cut(target):
            if not wanted():
                self._drain(left)
                return
            self._receive_piece(piece)
            left -= total_bytes(piece)

    def discard(self, source: Sequence[Span]) -> None:
        self._drain(total_bytes(source))

    def stop(self) -> None:
        with self._stopping:
            if self._stopped.done():
                return
            self._stopped.set_result(None)
            with contextlib.suppress(TransferFailed, OSError), library_errors(f"stopping {self._name}"):
                if self._name == "nccl":
                    self._group.abort()
                else:
                    self._group.recv([self._buffer(1)], self._peer, _NEVER_SENT).wait(_AT_ONCE)

    def close(self) -> None:
        self.stop()
        for waiter in self._waiters:
            waiter.close()
        self._group = self._bytes = None

    @property
    def _whole(self) -> torch.Tensor:
        if self._bytes is None:
            raise TransferFailed("the link is over")
        return self._bytes

    def _cut(self, spans: Sequence[Span]) -> Iterator[list[Span]]:
        require_inside(list(spans), self._whole.numel(), "our")
        return chunks(spans, PIECE_BYTES)

    def _view(self, span: Span) -> torch.Tensor:
        return self._whole[span.offset : span.offset + span.nbytes]

    def _buffer(self, nbytes: int) -> torch.Tensor:
        return self._whole.new_empty(nbytes)

    def _receive_piece(self, piece: list[Span]) -> None:
        with self._working("receiving"):
            if len(piece) == 1:
                self._settle(self._receive(self._view(piece[0])), _RECEIVING)
                return
            buffer = self._buffer(total_bytes(piece))
            self._settle(self._receive(buffer), _RECEIVING)
            at = 0
            for span in piece:
                self._view(span).copy_(buffer[at : at + span.nbytes])
                at += span.nbytes

    def _drain(self, nbytes: int) -> None:
        """Take a message for each piece off the stream."""
        for start in range(0, nbytes, PIECE_BYTES):
            with self._working("receiving"):
                self._settle(self._receive(self._buffer(min(PIECE_BYTES, nbytes - start))), _RECEIVING)

    def _send(self, data: torch.Tensor) -> Any:
        return self._group.send([data], self._peer, _DATA)

    def _receive(self, data: torch.Tensor) -> Any:
        return self._group.recv([data], self._peer, _DATA)

    def _settle(self, work: Any, direction: int, patience: timedelta = _PATIENCE) -> None:
        """Wait until the bytes have moved. nccl only queues its kernels, so it is looked at until they have run."""
        if self._name != "nccl":
            self._waiters[direction].wait_for(work, patience)
            return
        until = time.monotonic() + patience.total_seconds()
        while not work.is_completed():
            self._check()
            if time.monotonic() >= until:
                raise TransferFailed(f"no answer within {patience}")
            time.sleep(_LOOK_S)

    def _check(self) -> None:
        if self._stopped.done():
            raise TransferFailed("the link is over")

    @contextlib.contextmanager
    def _working(self, doing: str) -> Iterator[None]:
        self._check()
        with library_errors(f"{self._name}: {doing}"):
            yield


class Waiter:
    """A thread that waits for gloo, so that its caller can be told by `stopped` as well.

    Left with a message that broke off, it waits until its patience ends and keeps nobody from anything: the connection
    is closed, and nothing is written any more.
    """

    def __init__(self, stopped: Future[None]) -> None:
        self._stopped = stopped
        self._works: queue.SimpleQueue[tuple[Any, timedelta, Future[None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def wait_for(self, work: Any, patience: timedelta) -> None:
        """Raises what the work raises, or TransferFailed once the link is stopped."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-gloo", daemon=True)
            self._thread.start()
        moved: Future[None] = Future()
        self._works.put((work, patience, moved))
        wait([moved, self._stopped], return_when=FIRST_COMPLETED)
        if not moved.done():
            raise TransferFailed("the link is over")
        moved.result()

    def close(self) -> None:
        """The thread ends when it waits for nothing any more; usually that is now."""
        self._works.put(None)
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (item := self._works.get()) is not None:
            work, patience, moved = item
            try:
                with library_errors("gloo"):
                    work.wait(patience)
                moved.set_result(None)
            except (OSError, TransferFailed) as err:
                moved.set_exception(err)
            del item, work, moved


class _Raw:
    """Device memory as other libraries' arrays describe it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def flat_bytes(memory: KVMemory) -> torch.Tensor:
    """All bytes of a memory as one tensor, uint8 [nbytes], without a copy."""
    import torch

    if memory.device is None:
        return torch.frombuffer(memory.region, dtype=torch.uint8)
    return device_bytes(memory.address, region_bytes(memory), memory.device)


def device_bytes(address: int, nbytes: int, device: int) -> torch.Tensor:
    """CUDA memory at `address` as a tensor, uint8 [nbytes], without a copy."""
    import torch

    return torch.as_tensor(_Raw(address, nbytes), device=f"cuda:{device}")


def _distributed() -> Any:
    """Much of it has no types, and what there is depends on how torch was built."""
    import torch.distributed

    return torch.distributed


def _require_backend(name: str, memory: KVMemory) -> None:
    import torch

    dist = _distributed()
    if not dist.is_available():
        raise Unusable(f"{name}: this torch is built without distributed; install another build of torch")
    if name == "nccl":
        if not torch.cuda.is_available() or not dist.is_nccl_available():
            raise Unusable(f"nccl: CUDA is absent; {GPU_HELP}")
        if memory.device is None:
            raise Unusable("nccl: the KV memory of this worker is on the CPU; name gloo, shm or tcp")
    elif not dist.is_gloo_available():
        raise Unusable("gloo: this torch is built without gloo; name tcp")
    elif memory.device is not None:
        raise Unusable("gloo: the KV memory of this worker is on a GPU; name nccl or nixl")


def _open_store(host: str) -> tuple[Any, int]:
    """A store that listens on `host` alone: left to itself it listens on all addresses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen(64)
        port = listener.getsockname()[1]
        fd = listener.detach()
    store = _distributed().TCPStore(
        host, port, None, True, _STORE_PATIENCE, wait_for_workers=False, master_listen_fd=fd, use_libuv=True
    )
    return store, port


def _dial_store(offer: StoreOffer, facts: LinkFacts) -> Any:
    patience = timedelta(seconds=facts.timeout_s)
    return _distributed().TCPStore(offer.host, offer.port, None, False, patience, wait_for_workers=False)
