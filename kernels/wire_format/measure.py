"""How fast this machine converts: what `kvtransfer.wire_choice` weighs against the bandwidth to a peer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .formats import wire_layer_bytes
from .op import decode, encode


def measure_conversion(
    shape: tuple[int, int, int],
    source_dtype: torch.dtype,
    target_dtype: torch.dtype,
    wire_dtype: str,
    clock: Callable[[], float],
    *,
    num_wire_blocks: int = 64,
    rounds: int = 5,
) -> float:
    """Bytes of the source's cache per second that go through `encode` and `decode`, one after the other.

    shape: (block_size, num_kv_heads, head_dim). The best of `rounds` after one to warm up, as anything else on the
    machine only adds. `clock` returns seconds; one that stands still counts as a nanosecond.
    """
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn((num_wire_blocks, 2, *shape), generator=generator).to(source_dtype)
    data = torch.empty(num_wire_blocks, wire_layer_bytes(*shape, wire_dtype), dtype=torch.uint8)
    out = torch.empty_like(kv, dtype=target_dtype)

    def convert() -> float:
        start = clock()
        encode(kv, data, wire_dtype)
        decode(data, out, wire_dtype)
        return clock() - start

    convert()
    return kv.nbytes / max(1e-9, min(convert() for _ in range(rounds)))
