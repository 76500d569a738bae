"""How near paged attention comes to what the CUDA device can do.

    python -m penstock.kernels.paged_attention.bench

Each line is one shape: the median time of a call, its rate, and the share of the limit, which is measured in the same
run: bytes of keys and values a second against a plain copy (decode), operations a second against a bfloat16 matrix
product (prefill). The level-2 cache is overwritten before each call. Every shape is compared with torch's own
attention first; nothing is timed that is wrong.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .device_plan import DevicePlan, build_device_plan
from .op import EIGHT_BITS, paged_attention

_POOL_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
_CACHE_BYTES = 256 << 20  # more than any level-2 cache
_TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True)
class Heads:
    """The sizes of a model's attention and of its pool."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    pool_dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One call: arguments of `op.paged_attention` for sequences of one length."""

    q: torch.Tensor
    kv_pool: torch.Tensor
    kv_scales: torch.Tensor | None
    plan: DevicePlan
    batch: int

    def run(self) -> torch.Tensor:
        scale = self.q.shape[2] ** -0.5
        return paged_attention(self.q, self.kv_pool, 0, self.plan, scale=scale, kv_scales=self.kv_scales)

    def check(self) -> None:
        """Raises AssertionError when the first sequence's result is not what torch's own attention says."""
        rows = self.q.shape[0] // self.batch
        blocks = self.kv_pool[self.plan.block_table[0].long(), 0].float()
        if self.kv_scales is not None:
            blocks *= self.kv_scales[self.plan.block_table[0].long(), 0][:, :, None, :, None]
        k, v = blocks.transpose(0, 1).flatten(1, 2)[:, : self.plan.max_context_len].transpose(1, 2)
        visible = torch.ones(rows, k.shape[1], dtype=torch.bool, device=k.device).tril(k.shape[1] - rows)
        q = self.q[:rows].float().transpose(0, 1)
        expected = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible, enable_gqa=True)
        actual = self.run()[:rows].float().transpose(0, 1)
        torch.testing.assert_close(actual, expected[0], rtol=_TOLERANCE, atol=_TOLERANCE)


def make_inputs(heads: Heads, batch: int, earlier: int, new: int, device: torch.device) -> Inputs:
    """`batch` sequences with `earlier` tokens in the pool and `new` ones; their blocks lie in random order."""
    generator = torch.Generator(device).manual_seed(0)
    per_seq = -(-(earlier + new) // heads.block_size)
    shape = (batch * per_seq, 1, 2, heads.block_size, heads.num_kv_heads, heads.head_dim)
    kv_pool = torch.empty(shape, dtype=heads.pool_dtype, device=device)
    kv_scales = None
    step = 1.0
    if heads.pool_dtype in EIGHT_BITS:
        step = 1 / 32
        kv_scales = torch.full((*shape[:3], shape[4]), step, device=device)
    for block in kv_pool:  # one at a time: the numbers before they are rounded need not fit beside the pool
        block.copy_(torch.randn(shape[1:], device=device, generator=generator).clamp_(-3.9, 3.9).div_(step))
    block_table = np.random.default_rng(0).permutation(batch * per_seq).reshape(batch, per_seq)
    plan = build_device_plan(np.arange(batch + 1) * new, np.full(batch, earlier + new), block_table, device)
    num_heads = heads.num_kv_heads * heads.group
    q = torch.randn(batch * new, num_heads, heads.head_dim, device=device, generator=generator).to(torch.bfloat16)
    return Inputs(q, kv_pool, kv_scales, plan, batch)


def measure(run: Callable[[], object], rounds: int = 30) -> float:
    """Median seconds of one call on the device, with a cold cache, after three calls to warm up."""
    cold = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        cold.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written together, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source))


def product_rate(device: torch.device) -> float:
    """Operations a second of a bfloat16 matrix product; a multiplication and an addition are two."""
    side = 8192
    a, b = torch.randn(2, side, side, device=device).to(torch.bfloat16)
    return 2 * side**3 / measure(lambda: a @ b)


def bench_decode(heads: Heads, device: torch.device) -> None:
    limit = copy_rate(device)
    _say(f"decode, one new token a sequence; a copy moves {limit / 1e9:.0f} GB/s")
    for batch, context in [(1, 4096), (1, 131_072), (8, 8192), (32, 4096), (128, 2048), (256, 1024)]:
        inputs = make_inputs(heads, batch, context - 1, 1, device)
        inputs.check()
        elapsed = measure(inputs.run)
        width = heads.num_kv_heads * heads.head_dim * heads.pool_dtype.itemsize
        rate = batch * context * 2 * width / elapsed
        _say(
            f"  batch {batch:>4}  context {context:>7}  {elapsed * 1e6:9.1f} us  {rate / 1e9:7.0f} GB/s  {rate / limit:6.1%}"
        )


def bench_prefill(heads: Heads, device: torch.device) -> None:
    limit = product_rate(device)
    _say(f"prefill; a bfloat16 matrix product does {limit / 1e12:.0f} TFLOP/s")
    for batch, earlier, new in [(1, 0, 2048), (1, 0, 8192), (8, 0, 1024), (1, 6144, 2048), (1, 30_720, 2048)]:
        inputs = make_inputs(heads, batch, earlier, new, device)
        inputs.check()
        elapsed = measure(inputs.run)
        pairs = batch * (new * earlier + new * (new + 1) // 2)
        rate = 4 * pairs * heads.num_kv_heads * heads.group * heads.head_dim / elapsed
        _say(
            f"  batch {batch:>2}  earlier {earlier:>6}  new {new:>5}  {elapsed * 1e6:9.1f} us"
            f"  {rate / 1e12:6.1f} TFLOP/s  {rate / limit:6.1%}"
        )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m penstock.kernels.paged_attention.bench",
        description="Measure paged attention on a CUDA device against the rate of a copy and of a matrix product.",
        epilog="example: python -m penstock.kernels.paged_attention.bench --only decode --pool-dtype int8",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", choices=["decode", "prefill", "both"], default="both", help="what to measure")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads")
    parser.add_argument("--group", type=int, default=4, help="query heads that share a KV head")
    parser.add_argument("--head-dim", type=int, default=128, help="numbers in a head")
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a block of the pool")
    parser.add_argument(
        "--pool-dtype", choices=_POOL_DTYPES, default="bfloat16", help="type of the numbers in the pool"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("bench: torch finds no CUDA device here; run this on a machine with a GPU\n")
        return 1
    device = torch.device("cuda")
    heads = Heads(chosen.kv_heads, chosen.group, chosen.head_dim, chosen.block_size, _POOL_DTYPES[chosen.pool_dtype])
    _say(f"{torch.cuda.get_device_name(device)}, {heads}")
    if chosen.only != "prefill":
        bench_decode(heads, device)
    if chosen.only != "decode":
        bench_prefill(heads, device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
