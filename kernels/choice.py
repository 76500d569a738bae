"""Which implementation an op runs: its Triton kernel for tensors on CUDA, torch's own parts for all others.

Triton is imported when the first kernel is wanted and never before, so a machine without it runs everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..core.errors import InternalError

_asked: list[bool] = []


def runs_triton(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" or bool(_asked)


@contextmanager
def triton_everywhere() -> Iterator[None]:
    """Run the Triton kernels on tensors in main memory too: for tests, with Triton's interpreter."""
    _asked.append(True)
    try:
        yield
    finally:
        _asked.pop()


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """Raises InternalError naming the first tensor that lies elsewhere than the first one."""
    given = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    for name, device in given:
        if device != given[0][1]:
            raise InternalError(f"{name} is on {device}, {given[0][0]} is on {given[0][1]}")


def next_power_of_two(number: int) -> int:
    """The smallest that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()
