"""`python -m penstock.kernels.rms_norm.bench`: share of the memory's rate that the norms reach."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..gpu_limits import Case, Work, check_close, report_all, require_cuda
from . import op, reference

_EPS = 1e-5


def cases(device: torch.device) -> Iterator[Case]:
    """Each is to be run before the next is asked for."""
    for rows, width in [(1, 4096), (64, 4096), (8192, 4096), (8192, 8192)]:
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        residual, weight = torch.randn_like(x), torch.randn(width, device=device, dtype=torch.bfloat16)
        check_close(op.rms_norm(x, weight, _EPS), reference.rms_norm(x.cpu(), weight.cpu(), _EPS))
        yield Case(
            f"rms_norm {rows} x {width}",
            lambda: op.rms_norm(x, weight, _EPS),
            Work(2 * x.nbytes),
            lambda: F.rms_norm(x, (width,), weight, _EPS),
        )
        yield Case(
            f"add_rms_norm {rows} x {width}",
            lambda: op.add_rms_norm(x, residual, weight, _EPS),
            Work(4 * x.nbytes),
            lambda: F.rms_norm(residual.add_(x), (width,), weight, _EPS),
        )


def main() -> None:
    report_all(cases(require_cuda()))


if __name__ == "__main__":
    main()
