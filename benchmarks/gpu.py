"""What the GPU kernels and the decode step reach on this machine's CUDA device: `python benchmarks/gpu.py`.

Each figure is a share of what the same run measured the device to do at best: bytes a copy moves, operations of a
bfloat16 matrix product. The bars:

    paged decode attention    85 % of the copy's rate, 64 sequences of 4096 tokens
    prefill attention         55 % of the product's rate, 16384 tokens, causal, head dim 128
    fused operations          85 % of the copy's rate, where they move enough to be timed
    decode step               1.3 x its bytes by the copy's rate: a network of Llama 8B's shape, 64 sequences

Beside them torch's attention and products, and transformers' continuous batching where it is installed. Takes some
minutes, the first run longer: kernels are compiled and tuned. Progress goes to stderr, the table to stdout.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from penstock.benchmarks import gpu_decode, gpu_ops
from penstock.benchmarks.gpu_figures import Figure, table
from penstock.benchmarks.gpu_peer import NoPeer, peer_step_seconds
from penstock.benchmarks.quick import commit, machine, say
from penstock.kernels.gpu_limits import bytes_per_second, device_or_say, operations_per_second

NUM_SEQS, PEER_CONTEXT = 64, 1024


def measure(device: torch.device, quick: bool) -> tuple[list[Figure], list[str]]:
    """The figures, and what was left out with the reason."""
    limits = bytes_per_second() / 1e9, operations_per_second() / 1e12
    say("a copy moves {:.0f} GB/s, a product does {:.0f} TFLOP/s".format(*limits))
    figures = [*gpu_ops.attention(device, quick), *gpu_ops.fused(device, quick)]
    contexts = [PEER_CONTEXT] if quick else [PEER_CONTEXT, 4096]
    steps = list(gpu_decode.decode_steps(device, gpu_decode.LLAMA_8B, NUM_SEQS, contexts))
    gc.collect()
    torch.cuda.empty_cache()
    left_out = []
    try:
        peer = peer_step_seconds(gpu_decode.LLAMA_8B, NUM_SEQS, PEER_CONTEXT, 64, device)
    except NoPeer as err:
        left_out.append(f"no decode step beside ours: {err}")
        say(left_out[0])
    else:
        steps[0] = replace(steps[0], others={"transformers, continuous batching": peer})
    return [*figures, *steps], left_out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py",
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python benchmarks/gpu.py --json benchmarks/results/gpu.json",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--quick", action="store_true", help="the shapes that have a bar, and few others")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where there is no device to measure."""
    chosen = parse(arguments)
    device = device_or_say("gpu")
    if device is None:
        return 1
    figures, left_out = measure(device, chosen.quick)
    print(table(figures))
    for reason in left_out:
        print(f"\n{reason}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(record(device, figures, left_out), indent=1) + "\n")
        say(f"written to {chosen.json}")
    return 0


def record(device: torch.device, figures: list[Figure], left_out: list[str]) -> dict[str, Any]:
    import triton

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "copy_bytes_per_s": bytes_per_second(),
        "product_operations_per_s": operations_per_second(),
        "figures": [figure.record() for figure in figures],
        "left_out": left_out,
    }


if __name__ == "__main__":
    raise SystemExit(main())
