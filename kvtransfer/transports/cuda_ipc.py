"""Two workers on the GPUs of one host: decode maps the memory of prefill and copies out of it on the device.

    open      name the allocation that holds the memory by an IPC handle of the CUDA driver
    connect   open the peer's handle: its memory has an address in this process
    receive   copies on a stream of our own, and an event behind them; the engine's stream is not held up
    close     unmap it, after the stream has run dry

The driver's handle names a whole allocation made by cudaMalloc; memory of the virtual memory API (torch's
expandable segments) has none, and is refused when the transport is opened.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ...core.errors import TransferFailed
from ...core.ids import WorkerKey
from ...engine.kv_memory import KVMemory
from ..bulk import Bulk, LinkFacts, Span, Transport, Unusable
from ..identity import boot_id
from .library import PIECE_BYTES, decode_offer, encode_offer, library_errors, region_bytes, require_inside
from .process_group import GPU_HELP, device_bytes, flat_bytes
from .runs import paired

if TYPE_CHECKING:
    import torch

_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class IpcOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    handle: Annotated[bytes, msgspec.Meta(min_length=_HANDLE_BYTES, max_length=_HANDLE_BYTES)]
    offset: Annotated[int, msgspec.Meta(ge=0)]  # of the memory in its allocation
    nbytes: Annotated[int, msgspec.Meta(ge=1)]
    host_id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class CudaIpcTransport(Transport):
    name = "cuda_ipc"

    def __init__(self, memory: KVMemory, me: WorkerKey) -> None:
        """Raises Unusable for memory that is not on a GPU, or that the driver has no handle for."""
        if memory.device is None:
            raise Unusable("cuda_ipc: the KV memory of this worker is on the CPU; name shm or tcp")
        self._memory, self._device = memory, memory.device
        try:
            self._driver = _Driver(self._device)
            handle, offset = self._driver.export(memory.address)
        except (OSError, TransferFailed) as err:
            raise Unusable(f"cuda_ipc: {err}; {GPU_HELP}, and memory made without expandable segments") from err
        self._offer = encode_offer(IpcOffer(handle, offset, region_bytes(memory), boot_id() or "unknown"))

    def offer(self) -> bytes:
        return self._offer

    def connect(self, facts: LinkFacts, peer_offer: bytes) -> Bulk:
        offer = decode_offer(peer_offer, IpcOffer, facts)
        if offer.host_id != boot_id():
            raise Unusable(f"cuda_ipc: {facts.peer} is on another host")
        if offer.nbytes != facts.peer_bytes:
            raise TransferFailed(f"{facts.peer} offers {offer.nbytes} bytes; expected {facts.peer_bytes}")
        base = self._driver.open(offer.handle)
        return CudaIpcBulk(self._memory, self._driver, base, offer)

    def close(self) -> None:
        """Nothing is held open: a handle is only a name."""


class CudaIpcBulk(Bulk):
    """Made by `CudaIpcTransport.connect`; owns the mapping at `base`."""

    quarantine_s = 0.0  # `close` waits for the last copy
    in_parts = True

    def __init__(self, memory: KVMemory, driver: _Driver, base: int, offer: IpcOffer) -> None:
        import torch

        self._driver, self._base = driver, base
        self._mine: torch.Tensor | None = flat_bytes(memory)
        self._theirs: torch.Tensor | None = device_bytes(base + offer.offset, offer.nbytes, driver.device)
        self._stream: Any = torch.cuda.Stream(driver.device)  # type: ignore[no-untyped-call]
        self._stopped = threading.Event()

    def send(self, spans: Sequence[Span]) -> None:
        """The peer reads by itself; what it reads must have been computed."""
        import torch

        with library_errors("cuda_ipc: waiting for the engine"):
            torch.cuda.current_stream(self._driver.device).synchronize()

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> None:
        import torch

        cuda: Any = torch.cuda
        mine, theirs = self._mine, self._theirs
        if mine is None or theirs is None:
            raise TransferFailed("the link is over")
        require_inside(list(source), theirs.numel(), "the peer's")
        require_inside(list(target), mine.numel(), "our")
        for start, stop, nbytes in paired(source, target, PIECE_BYTES):
            if self._stopped.is_set():
                raise TransferFailed("the link is over")
            if not wanted():
                break
            with library_errors("cuda_ipc: copying"), cuda.stream(self._stream):
                mine[stop : stop + nbytes].copy_(theirs[start : start + nbytes], non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record(self._stream)
                copied.synchronize()

    def discard(self, source: Sequence[Span]) -> None:
        """Nothing has been sent."""

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self._stopped.set()
        if self._theirs is None:
            return
        self._mine = self._theirs = None
        with library_errors("cuda_ipc: closing"):
            self._stream.synchronize()
        self._driver.close(self._base)


class _Driver:
    """The five calls of the CUDA driver that this needs, in the context that torch uses on `device`."""

    def __init__(self, device: int) -> None:
        """Raises OSError where there is no driver, TransferFailed where torch has no such device."""
        import torch

        self.device = device
        self._cuda = ctypes.CDLL("libcuda.so.1")
        with library_errors(f"CUDA device {device}"):
            torch.zeros(1, device=f"cuda:{device}")  # makes the context

    def export(self, address: int) -> tuple[bytes, int]:
        """The IPC handle of the allocation around `address`, and where in it that is."""
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle), address - base.value

    def open(self, handle: bytes) -> int:
        """The address at which the peer's allocation is mapped."""
        base = ctypes.c_uint64()
        named = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(base), named, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return base.value

    def close(self, base: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(base))

    def _call(self, function: str, *arguments: Any) -> None:
        import torch

        with torch.cuda.device(self.device):
            status = getattr(self._cuda, function)(*arguments)
        if status:
            raise TransferFailed(f"{function} failed with CUDA error {status}")


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * _HANDLE_BYTES)]
