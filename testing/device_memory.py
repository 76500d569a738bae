"""KV memory on a GPU, as far as a transport sees it: for tests of the transports on machines that have one."""

from __future__ import annotations

import torch


class DeviceMemory:
    """`nbytes` bytes of CUDA device number `device`, in an allocation of their own."""

    staging_bytes = 0

    def __init__(self, nbytes: int, device: int) -> None:
        self.nbytes, self.device = nbytes, device
        self._bytes = torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{device}")

    @property
    def address(self) -> int:
        return self._bytes.data_ptr()

    def write(self, data: bytes) -> None:
        self._bytes.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        torch.cuda.synchronize(self.device)

    def read(self) -> bytes:
        torch.cuda.synchronize(self.device)
        return self._bytes.cpu().numpy().tobytes()

    def close(self) -> None:
        self._bytes = torch.zeros(0, dtype=torch.uint8)
