"""The operations of a step on a CUDA device, beside torch's: attention, what is fused around it, quantised products.

Every shape has been compared with torch before it is timed: `kernels/*/bench.py` do so as they make it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from penstock.benchmarks.gpu_figures import Figure, measure
from penstock.kernels.gpu_limits import Case
from penstock.kernels.logits import bench as logits
from penstock.kernels.paged_attention.bench import Heads, Inputs, make_inputs
from penstock.kernels.quant_matmul import bench as quant_matmul
from penstock.kernels.rms_norm import bench as rms_norm
from penstock.kernels.rope_kv_write import bench as rope_kv_write
from penstock.kernels.silu_mul import bench as silu_mul

DECODE_BAR, PREFILL_BAR, FUSED_BAR = 0.85, 0.55, 0.85
_LEAST_BYTES = 16 << 20  # an op that moves less is over sooner than a launch: its share says nothing
_POOLS = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}


def attention(device: torch.device, quick: bool) -> Iterator[Figure]:
    """The bars are those of bfloat16: decode of 64 sequences of 4096 tokens, a prompt of 16384."""
    for name, dtype in _POOLS.items():
        heads = Heads(num_kv_heads=8, group=4, head_dim=128, block_size=16, pool_dtype=dtype)
        bar = DECODE_BAR if dtype == torch.bfloat16 else None
        yield _attention(f"decode, 64 sequences of 4096, {name}", make_inputs(heads, 64, 4095, 1, device), bar)
    heads = Heads(num_kv_heads=8, group=4, head_dim=128, block_size=16, pool_dtype=torch.bfloat16)
    yield _attention("prefill, 16384 tokens", make_inputs(heads, 1, 0, 16_384, device), PREFILL_BAR)
    if not quick:
        yield _attention("decode, 1 sequence of 131072", make_inputs(heads, 1, 131_071, 1, device), None)
        yield _attention("decode, 256 sequences of 1024", make_inputs(heads, 256, 1023, 1, device), None)
        yield _attention("prefill, 2048 tokens after 30720", make_inputs(heads, 1, 30_720, 2048, device), None)


def _attention(name: str, inputs: Inputs, bar: float | None) -> Figure:
    inputs.check()
    earlier = inputs.plan.max_context_len - inputs.new
    others: dict[str, Callable[[], object]] = {}
    if inputs.kv_scales is None and (inputs.new == 1 or not earlier):  # torch's fast paths take no other mask
        q, k, v = inputs.dense(inputs.batch)
        is_causal = inputs.new > 1
        others["torch SDPA, dense cache"] = lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, enable_gqa=True
        )
    return measure(name, inputs.run, inputs.work(), bar, others)


def fused(device: torch.device, quick: bool) -> Iterator[Figure]:
    """Norms, activation, rotation with the cache's write; sampling and quantised products are shown without a bar."""
    for cases in (rms_norm.cases, silu_mul.cases, rope_kv_write.cases):
        for case in cases(device):
            yield _case(case, FUSED_BAR if case.work.nbytes >= _LEAST_BYTES else None, "torch")
    if quick:
        return
    for case in logits.cases(device):
        yield _case(case, None, "torch")
    for case in quant_matmul.cases(device):
        yield _case(case, None, "cuBLAS, bfloat16")


def _case(case: Case, bar: float | None, other: str) -> Figure:
    others = {} if case.by_torch is None else {other: case.by_torch}
    return measure(case.name, case.run, case.work, bar, others)
