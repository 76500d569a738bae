"""`python -m penstock.kernels.wire_pack.bench`: share of the memory's rate that packing and unpacking reach."""

from __future__ import annotations

import torch

from ..gpu_limits import Work, check_close, report, require_cuda
from ..wire_format.formats import wire_layer_bytes
from .op import pack, unpack

_SHAPE = (2048, 8, 2, 16, 8, 128)


def main() -> None:
    device = require_cuda()
    pool = torch.randn(_SHAPE, device=device, dtype=torch.bfloat16)
    block_ids = torch.randperm(_SHAPE[0], device=device)[:1024]
    for wire_dtype in ("bfloat16", "int8", "fp8_e4m3"):
        width = wire_layer_bytes(*_SHAPE[3:], wire_dtype)
        wire = torch.empty(len(block_ids), _SHAPE[1], width, dtype=torch.uint8, device=device)
        target = torch.zeros_like(pool)
        pack(pool, block_ids, 0, wire, wire_dtype)
        unpack(wire, target, block_ids, 0, wire_dtype)
        check_close(target[block_ids[:8]], pool[block_ids[:8]], 0.1)
        work = Work(wire.nbytes + pool.nbytes // 2)
        report(f"pack to {wire_dtype}", lambda: pack(pool, block_ids, 0, wire, wire_dtype), work)
        report(f"unpack from {wire_dtype}", lambda: unpack(wire, target, block_ids, 0, wire_dtype), work)


if __name__ == "__main__":
    main()
