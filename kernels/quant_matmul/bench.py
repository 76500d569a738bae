"""`python -m penstock.kernels.quant_matmul.bench`: share of the limit, the weight's bytes or the tensor cores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..gpu_limits import Case, Work, check_close, report_all, require_cuda
from . import reference
from .op import quant_matmul
from .weights import QuantWeight, to_fp8, to_int8

_OUTS, _INS = 14336, 4096


def cases(device: torch.device) -> Iterator[Case]:
    """Each is to be run before the next is asked for."""
    dense = torch.randn(_OUTS, _INS, device=device) / _INS**0.5
    codes = torch.randint(0, 256, (_OUTS, _INS // 2), device=device, dtype=torch.uint8)
    scales = torch.rand(_OUTS, _INS // 32, device=device) * 0.01
    weights = [QuantWeight("int4", codes, scales, -8 * scales), to_int8(dense), to_int8(dense, "w8a8"), to_fp8(dense)]
    plain = dense.to(torch.bfloat16)
    for weight in weights:
        for rows in (1, 64, 4096):
            x = torch.randn(rows, _INS, device=device, dtype=torch.bfloat16)
            check_close(quant_matmul(x[:64], weight), reference.quant_matmul(x[:64], weight), 5e-2)
            out_bytes = rows * _OUTS * 2
            factors = weight.scales.nbytes + (0 if weight.minima is None else weight.minima.nbytes)
            work = Work(weight.data.nbytes + factors + x.nbytes + out_bytes, 2 * rows * _OUTS * _INS)
            name = f"{weight.kind} {rows} x {_INS} x {_OUTS}"
            yield Case(name, lambda: quant_matmul(x, weight), work, lambda: F.linear(x, plain))


def main() -> None:
    report_all(cases(require_cuda()))


if __name__ == "__main__":
    main()
