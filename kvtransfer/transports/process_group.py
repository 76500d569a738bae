"""A torch process group of two for each link: gloo for memory on the CPU, nccl for memory on a GPU.

    open      a store on loopback, through which the two ends of a link find each other; its address is the offer
    connect   both ends make the group, the listener with rank 0 in its own store, and exchange a few bytes
    send      a message for each piece, matched by order
    stop      nccl: abort. gloo cannot abort, but a receive that times out closes its connections: such a one is posted

Neither library notices a frozen peer, and neither authenticates: the store and gloo listen on the given address only.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ...core.errors import TransferFailed
from ...core.ids import WorkerKey
from ...engine.kv_memory import KVMemory
from ..bulk import Bulk, LinkFacts, Span, Transport, Unusable
from .library import PIECE_BYTES, decode_offer, encode_offer, library_errors, require_inside
from .runs import chunks, total_bytes

if TYPE_CHECKING:
    import torch

_PATIENCE = timedelta(seconds=60)  # for one piece; the link's own liveness ends it much earlier
_STORE_PATIENCE = timedelta(seconds=5)
_AT_ONCE = timedelta(milliseconds=1)
_DATA, _NEVER_SENT = 0, 1  # tags
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
        number, patience = (1 if facts.is_dialer else 0), timedelta(seconds=facts.timeout_s)
        if self.name == "nccl":
            return dist.ProcessGroupNCCL(shared, number, 2, timeout=patience)
        options: Any = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = patience
        return dist.ProcessGroupGloo(shared, number, 2, options)


class ProcessGroupBulk(Bulk):
    """Made by `ProcessGroupTransport.connect`. `peer`: its rank."""

    quarantine_s = 0.0  # a closed connection takes no more bytes, and an aborted communicator runs no more kernels
    is_reader = False

    def __init__(self, name: str, memory: KVMemory, group: Any, peer: int) -> None:
        self._name, self._group, self._peer = name, group, peer
        self._bytes: torch.Tensor | None = flat_bytes(memory)
        self._stopped, self._stopping = threading.Event(), threading.Lock()

    def greet(self, timeout_s: float) -> None:
        """Exchange a few bytes with the peer, which makes the connection."""
        import torch

        mine, theirs = torch.ones(8, dtype=torch.uint8, device=self._whole.device), self._buffer(8)
        with self._working("greeting"):
            sent, heard = self._send(mine), self._receive(theirs)
            for work in (heard, sent):
                self._settle(work, timedelta(seconds=timeout_s))
        if not torch.equal(mine, theirs):
            raise TransferFailed(f"{self._name}: the peer greets with other bytes")

    def send(self, spans: Sequence[Span]) -> None:
        import torch

        for piece in self._cut(spans):
            with self._working("sending"):
                views = [self._view(span) for span in piece]
                self._settle(self._send(views[0] if len(views) == 1 else torch.cat(views)))

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
            if self._stopped.is_set():
                return
            self._stopped.set()
            with contextlib.suppress(TransferFailed, OSError), library_errors(f"stopping {self._name}"):
                if self._name == "nccl":
                    self._group.abort()
                else:
                    self._group.recv([self._buffer(1)], self._peer, _NEVER_SENT).wait(_AT_ONCE)

    def close(self) -> None:
        self.stop()
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
                self._settle(self._receive(self._view(piece[0])))
                return
            buffer: Any = self._buffer(total_bytes(piece))
            self._settle(self._receive(buffer))
            for span, part in zip(piece, buffer.split([span.nbytes for span in piece]), strict=True):
                self._view(span).copy_(part)

    def _drain(self, nbytes: int) -> None:
        """Take a message for each piece off the stream."""
        for start in range(0, nbytes, PIECE_BYTES):
            with self._working("receiving"):
                self._settle(self._receive(self._buffer(min(PIECE_BYTES, nbytes - start))))

    def _send(self, data: torch.Tensor) -> Any:
        return self._group.send([data], self._peer, _DATA)

    def _receive(self, data: torch.Tensor) -> Any:
        return self._group.recv([data], self._peer, _DATA)

    def _settle(self, work: Any, patience: timedelta = _PATIENCE) -> None:
        """Wait until the bytes have moved. nccl only queues its kernels, so it is looked at until they have run."""
        if self._name != "nccl":
            work.wait(patience)
            return
        until = time.monotonic() + patience.total_seconds()
        while not work.is_completed():
            if self._stopped.is_set() or time.monotonic() >= until:
                raise TransferFailed("the link is over" if self._stopped.is_set() else f"no answer within {patience}")
            time.sleep(_LOOK_S)

    @contextlib.contextmanager
    def _working(self, doing: str) -> Iterator[None]:
        if self._stopped.is_set():
            raise TransferFailed("the link is over")
        with library_errors(f"{self._name}: {doing}"):
            yield


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
    return device_bytes(memory.address, len(memory.region), memory.device)


def device_bytes(address: int, nbytes: int, device: int) -> torch.Tensor:
    """CUDA memory at `address` as a tensor, uint8 [nbytes], without a copy."""
    import torch

    return torch.as_tensor(_Raw(address, nbytes), device=f"cuda:{device}")


def _require_backend(name: str, memory: KVMemory) -> None:
    import torch
    import torch.distributed as dist

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
    dist = _distributed()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen(64)
        port = listener.getsockname()[1]
        fd = listener.detach()
    store = dist.TCPStore(
        host, port, None, True, _STORE_PATIENCE, wait_for_workers=False, master_listen_fd=fd, use_libuv=True
    )
    return store, port


def _dial_store(offer: StoreOffer, facts: LinkFacts) -> Any:
    patience = timedelta(seconds=facts.timeout_s)
    return _distributed().TCPStore(offer.host, offer.port, None, False, patience, wait_for_workers=False)


def _distributed() -> Any:
    """`torch.distributed`, which has more than its types say."""
    import torch.distributed

    return torch.distributed
