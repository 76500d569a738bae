"""How near paged attention comes to what the CUDA device can do.

    python -m penstock.kernels.paged_attention.bench

Each line is one shape: the median time of a call, its rates, and its share of the limit, which is measured in the same
run: a copy of memory for decode, a bfloat16 matrix product for prefill, whichever the shape meets first. Every shape is
compared with torch's own attention before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..gpu_limits import Work, bytes_per_second, check_close, device_or_say, operations_per_second, report
from .device_plan import DevicePlan, build_device_plan
from .op import EIGHT_BITS, paged_attention

_POOL_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
_DECODES = [(1, 4096), (1, 131_072), (8, 8192), (32, 4096), (128, 2048), (256, 1024)]  # sequences, context
_PREFILLS = [(1, 0, 2048), (1, 0, 8192), (8, 0, 1024), (1, 6144, 2048), (1, 30_720, 2048)]  # sequences, earlier, new


@dataclass(frozen=True, slots=True)
class Heads:
    """The sizes of a model's attention and of its pool; `group` is query heads per KV head."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    pool_dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One call for `batch` sequences of one length."""

    heads: Heads
    batch: int
    new: int
    q: torch.Tensor
    kv_pool: torch.Tensor
    kv_scales: torch.Tensor | None
    plan: DevicePlan

    def run(self) -> torch.Tensor:
        scale = self.heads.head_dim**-0.5
        return paged_attention(self.q, self.kv_pool, 0, self.plan, scale=scale, kv_scales=self.kv_scales)

    def dense(self, num_seqs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [num_seqs, heads, new, head_dim], and k and v [num_seqs, KV heads, keys, head_dim] out of the pool, as the
        first `num_seqs` sequences have them; of q's type.
        """
        block_ids = self.plan.block_table[:num_seqs].long()
        blocks = self.kv_pool[block_ids, 0].to(self.q.dtype)
        if self.kv_scales is not None:
            blocks *= self.kv_scales[block_ids, 0][:, :, :, None, :, None].to(self.q.dtype)
        parts = blocks.transpose(1, 2).flatten(2, 3)[:, :, : self.plan.max_context_len].transpose(2, 3)
        q = self.q[: num_seqs * self.new].view(num_seqs, self.new, *self.q.shape[1:]).transpose(1, 2)
        return q.contiguous(), parts[:, 0].contiguous(), parts[:, 1].contiguous()

    def check(self) -> None:
        """Raises AssertionError when the first sequence's result is not what torch's own attention says."""
        q, k, v = (part.float() for part in self.dense(1))
        # Repeated here: with enable_gqa, float32 takes the path that keeps the scores of all pairs in memory.
        k, v = (part.repeat_interleave(self.heads.group, dim=1) for part in (k, v))
        num_keys = self.plan.max_context_len
        if num_keys == self.new:
            expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            visible = torch.ones(self.new, num_keys, dtype=torch.bool, device=k.device).tril(num_keys - self.new)
            expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        check_close(self.run()[: self.new], expected[0].transpose(0, 1))

    def work(self) -> Work:
        heads, num_keys = self.heads, self.plan.max_context_len
        kv_bytes = 2 * num_keys * heads.num_kv_heads * heads.head_dim * heads.pool_dtype.itemsize
        pairs = self.new * (num_keys - self.new) + self.new * (self.new + 1) // 2
        operations = 4 * pairs * heads.num_kv_heads * heads.group * heads.head_dim
        return Work(self.batch * kv_bytes + 2 * self.q.nbytes, self.batch * operations)


def make_inputs(heads: Heads, batch: int, earlier: int, new: int, device: torch.device) -> Inputs:
    """Sequences with `earlier` tokens in the pool and `new` ones; their blocks lie in random order."""
    generator = torch.Generator(device).manual_seed(0)
    per_seq = -(-(earlier + new) // heads.block_size)
    shape = (batch * per_seq, 1, 2, heads.block_size, heads.num_kv_heads, heads.head_dim)
    values = torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)
    kv_scales = None
    if heads.pool_dtype in EIGHT_BITS:
        step = 1 / 32
        kv_scales = torch.full((*shape[:3], shape[4]), step, device=device)
        values.clamp_(-3.9, 3.9).div_(step)  # within the largest number of int8
    block_table = np.random.default_rng(0).permutation(batch * per_seq).reshape(batch, per_seq)
    plan = build_device_plan(np.arange(batch + 1) * new, np.full(batch, earlier + new), block_table, device)
    q_shape = (batch * new, heads.num_kv_heads * heads.group, heads.head_dim)
    q = torch.randn(q_shape, dtype=torch.bfloat16, device=device, generator=generator)
    return Inputs(heads, batch, new, q, values.to(heads.pool_dtype), kv_scales, plan)


def bench_decode(heads: Heads, device: torch.device) -> None:
    sys.stdout.write(f"decode, one new token; a copy moves {bytes_per_second() / 1e9:.0f} GB/s\n")
    for batch, context in _DECODES:
        inputs = make_inputs(heads, batch, context - 1, 1, device)
        inputs.check()
        report(f"  {batch} sequences of {context} tokens", inputs.run, inputs.work())


def bench_prefill(heads: Heads, device: torch.device) -> None:
    sys.stdout.write(f"prefill; a bfloat16 matrix product does {operations_per_second() / 1e12:.0f} TFLOP/s\n")
    for batch, earlier, new in _PREFILLS:
        inputs = make_inputs(heads, batch, earlier, new, device)
        inputs.check()
        report(f"  {batch} sequences of {new} tokens after {earlier}", inputs.run, inputs.work())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m penstock.kernels.paged_attention.bench",
        description="Measure paged attention on a CUDA device against the rates of a copy and of a matrix product.",
        epilog="example: python -m penstock.kernels.paged_attention.bench --only decode --pool-dtype int8",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", choices=["decode", "prefill", "both"], default="both", help="what to measure")
    parser.add_argument("--kv-heads", type=int, default=8, metavar="N", help="KV heads")
    parser.add_argument("--group", type=int, default=4, metavar="N", help="query heads that share a KV head")
    parser.add_argument("--head-dim", type=int, default=128, metavar="N", help="numbers in a head")
    parser.add_argument("--block-size", type=int, default=16, metavar="TOKENS", help="tokens in a block of the pool")
    parser.add_argument("--pool-dtype", choices=_POOL_DTYPES, default="bfloat16", help="type of the pool's numbers")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where there is no device to measure."""
    chosen = parse(arguments)
    device = device_or_say("bench")
    if device is None:
        return 1
    dtype = _POOL_DTYPES[chosen.pool_dtype]
    heads = Heads(chosen.kv_heads, chosen.group, chosen.head_dim, chosen.block_size, dtype)
    sys.stdout.write(f"{torch.cuda.get_device_name(device)}: {heads}\n")
    if chosen.only != "prefill":
        bench_decode(heads, device)
    if chosen.only != "decode":
        bench_prefill(heads, device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
