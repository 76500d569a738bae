"""`python -m penstock.kernels.rms_norm.bench`: share of the memory's rate that the norms reach."""

from __future__ import annotations

import torch

from ..gpu_limits import Work, check_close, report, require_cuda
from . import op, reference


def main() -> None:
    device = require_cuda()
    for rows, width in [(1, 4096), (64, 4096), (8192, 4096), (8192, 8192)]:
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        residual, weight = torch.randn_like(x), torch.randn(width, device=device, dtype=torch.bfloat16)
        check_close(op.rms_norm(x, weight, 1e-5), reference.rms_norm(x.cpu(), weight.cpu(), 1e-5))
        report(f"rms_norm {rows} x {width}", lambda: op.rms_norm(x, weight, 1e-5), Work(2 * x.nbytes))
        added = Work(4 * x.nbytes)
        report(f"add_rms_norm {rows} x {width}", lambda: op.add_rms_norm(x, residual, weight, 1e-5), added)


if __name__ == "__main__":
    main()
