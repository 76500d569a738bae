"""`python -m penstock.kernels.rope_kv_write.bench`: share of the memory's rate that rotation and write reach."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..gpu_limits import Case, Work, check_close, report_all, require_cuda
from . import reference
from .layout import CacheLayer, Rotation
from .op import rope_kv_write

_HEADS, _KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 32, 8, 128, 16


def cases(device: torch.device) -> Iterator[Case]:
    """Each is to be run before the next is asked for."""
    angles = torch.outer(torch.arange(32768.0), 10000 ** (-torch.arange(0, 1, 2 / _HEAD_DIM))).to(device)
    for num_tokens, dtype in [(64, torch.bfloat16), (8192, torch.bfloat16), (8192, torch.float8_e4m3fn)]:
        qkv = torch.randn(num_tokens, (_HEADS + 2 * _KV_HEADS) * _HEAD_DIM, device=device, dtype=torch.bfloat16)
        pool = torch.zeros(1024, 4, 2, _BLOCK_SIZE, _KV_HEADS, _HEAD_DIM, device=device).to(dtype)
        scales = None if dtype == qkv.dtype else torch.zeros(1024, 4, 2, _KV_HEADS, device=device)
        positions = torch.arange(num_tokens, device=device)
        rotation, cache = Rotation(angles.cos(), angles.sin(), positions), CacheLayer(pool, 1, scales)
        queries = qkv[:, : _HEADS * _HEAD_DIM].float().view(num_tokens, _HEADS, _HEAD_DIM)
        expected = reference.rotated(queries, rotation)
        rope_kv_write(qkv, _HEADS, rotation, cache, positions)
        check_close(qkv[:, : _HEADS * _HEAD_DIM], expected.view(num_tokens, -1))
        work = Work(num_tokens * _HEAD_DIM * (4 * _HEADS + 2 * _KV_HEADS * (2 + pool.itemsize) + 4))
        name = f"rope_kv_write {num_tokens} tokens, {dtype} cache"
        yield Case(name, lambda: rope_kv_write(qkv, _HEADS, rotation, cache, positions), work)


def main() -> None:
    report_all(cases(require_cuda()))


if __name__ == "__main__":
    main()
