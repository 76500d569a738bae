"""One call of paged attention, as the launchers of both kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..choice import next_power_of_two
from .device_plan import DevicePlan


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of `op.paged_attention`, and `out`, which is filled: [num_tokens, num_heads, head_dim], dense."""

    q: torch.Tensor
    kv_pool: torch.Tensor
    kv_scales: torch.Tensor | None
    tree: torch.Tensor | None
    out: torch.Tensor
    plan: DevicePlan
    layer: int
    scale: float
    window: int | None

    @property
    def num_kv_heads(self) -> int:
        return self.kv_pool.shape[4]

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q.shape[1] // self.num_kv_heads

    def constants(self) -> dict[str, int]:
        """What the kernels are compiled for."""
        _, num_layers, _, block_size, num_kv_heads, head_dim = self.kv_pool.shape
        return {
            "NUM_LAYERS": num_layers,
            "BLOCK_SIZE": block_size,
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": head_dim,
            "DIMS": next_power_of_two(head_dim),
            "WINDOW": self.window or 0,
        }
