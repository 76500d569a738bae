"""`python -m penstock.kernels.lora.bench`: share of the memory's rate, with one adapter and with many."""

from __future__ import annotations

import torch

from ..gpu_limits import Work, check_close, report, require_cuda
from . import reference
from .op import add_lora
from .weights import Adapters

_WIDTH, _INNER, _ADAPTERS = 4096, 16, 32


def main() -> None:
    device = require_cuda()
    down = torch.randn(_ADAPTERS, _INNER, _WIDTH, device=device, dtype=torch.bfloat16) / _WIDTH**0.5
    up, scales = torch.randn_like(down).transpose(1, 2).contiguous(), torch.ones(_ADAPTERS, device=device)
    adapters = Adapters(down, up, scales)
    for rows, num_adapters in [(32, 1), (32, 32), (4096, 1), (4096, 32)]:
        x, y = (torch.randn(rows, _WIDTH, device=device, dtype=torch.bfloat16) for _ in range(2))
        chosen = (torch.arange(rows, device=device) * num_adapters // rows).int()
        actual, expected = y[:32].clone(), y[:32].clone()
        add_lora(actual, x[:32], adapters, chosen[:32])
        reference.add_lora(expected, x[:32], adapters, chosen[:32])
        check_close(actual, expected, 5e-2)
        work = Work(3 * x.nbytes + num_adapters * 2 * _INNER * _WIDTH * 2)
        report(f"add_lora {rows} rows, {num_adapters} adapters", lambda: add_lora(y, x, adapters, chosen), work)


if __name__ == "__main__":
    main()
