"""Running an op through its Triton kernel: on the device where there is one, through the interpreter where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import pytest
import torch

from penstock.kernels.choice import triton_everywhere
from penstock.tests.kernels.tolerances import TOLERANCES

P = ParamSpec("P")
R = TypeVar("R")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = sorted(TOLERANCES, key=str)


@contextmanager
def poisoned() -> Iterator[None]:
    """What `torch.empty` returns is full of NaN, or of the largest integer: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(op: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `op` with its Triton kernel and with poisoned memory."""
    pytest.importorskip("triton")
    with triton_everywhere(), poisoned():
        return op(*args, **kwargs)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Within the tolerance of `dtype`, by default that of `actual`."""
    relative, absolute = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=relative, atol=absolute)
