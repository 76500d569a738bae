"""`python -m penstock.kernels.silu_mul.bench`: share of the memory's rate that the activation reaches."""

from __future__ import annotations

import torch

from ..gpu_limits import Work, check_close, report, require_cuda
from . import op, reference


def main() -> None:
    device = require_cuda()
    for rows, inner in [(1, 14336), (64, 14336), (8192, 14336)]:
        x = torch.randn(rows, 2 * inner, device=device, dtype=torch.bfloat16)
        check_close(op.silu_mul(x), reference.silu_mul(x.cpu()))
        report(f"silu_mul {rows} x {inner}", lambda: op.silu_mul(x), Work(x.nbytes * 3 // 2))


if __name__ == "__main__":
    main()
