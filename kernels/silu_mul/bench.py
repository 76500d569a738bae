"""`python -m penstock.kernels.silu_mul.bench`: share of the memory's rate that the activation reaches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..gpu_limits import Case, Work, check_close, report_all, require_cuda
from . import op, reference


def cases(device: torch.device) -> Iterator[Case]:
    """Each is to be run before the next is asked for."""
    for rows, inner in [(1, 14336), (64, 14336), (8192, 14336)]:
        x = torch.randn(rows, 2 * inner, device=device, dtype=torch.bfloat16)
        check_close(op.silu_mul(x), reference.silu_mul(x.cpu()))
        yield Case(
            f"silu_mul {rows} x {inner}",
            lambda: op.silu_mul(x),
            Work(x.nbytes * 3 // 2),
            lambda: F.silu(x[:, :inner]).mul_(x[:, inner:]),
        )


def main() -> None:
    report_all(cases(require_cuda()))


if __name__ == "__main__":
    main()
