"""What a CUDA device can do at best, measured on it, and how near an op comes: what every `bench.py` prints.

A time is the median of repeated calls by CUDA events, each after the level-2 cache was overwritten.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from ..core.errors import ConfigError

_ROUNDS = 30
_CACHE_BYTES = 256 << 20  # more than any level-2 cache


def require_cuda() -> torch.device:
    """Raises ConfigError where there is no device to measure."""
    if not torch.cuda.is_available():
        raise ConfigError("a kernel is measured on a CUDA device, and torch finds none here; run this on a GPU machine")
    return torch.device("cuda")


def device_or_say(program: str) -> torch.device | None:
    """The device; where there is none to measure, None behind one line on stderr."""
    try:
        return require_cuda()
    except ConfigError as err:
        sys.stderr.write(f"{program}: {err}\n")
        return None


def seconds(run: Callable[[], object]) -> float:
    """Median time of one call on the device."""
    device = require_cuda()
    cold = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device)
    for _ in range(3):
        run()
    times = []
    for _ in range(_ROUNDS):
        cold.zero_()
        start, stop = (torch.Event(device=device, enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


@cache
def bytes_per_second() -> float:
    """Read and written together, by a plain copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=require_cuda())
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


@cache
def operations_per_second(dtype: torch.dtype = torch.bfloat16) -> float:
    """Of a square matrix product in `dtype`; a multiplication and an addition count as two."""
    side = 8192
    a = torch.ones(side, side, dtype=dtype, device=require_cuda())
    return 2 * side**3 / seconds(lambda: torch.mm(a, a))


@dataclass(frozen=True, slots=True)
class Work:
    """What one call of an op has to do at least: bytes read and written, and operations where they are the limit."""

    nbytes: int
    operations: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One call of an op, found right by its `bench.py`. `by_torch`: what torch's own parts take for the same."""

    name: str
    run: Callable[[], object]
    work: Work
    by_torch: Callable[[], object] | None = None


def seconds_at_best(work: Work) -> float:
    """What the limit allows that `work` meets first."""
    return max(work.nbytes / bytes_per_second(), work.operations / operations_per_second() if work.operations else 0)


def report(name: str, run: Callable[[], object], work: Work) -> None:
    """Print time, rates and the share of whichever limit the op meets first."""
    elapsed = seconds(run)
    rates = f"{work.nbytes / elapsed / 1e9:8.1f} GB/s"
    if work.operations:
        rates += f" {work.operations / elapsed / 1e12:8.2f} TFLOP/s"
    share = seconds_at_best(work) / elapsed
    sys.stdout.write(f"{name:<44} {elapsed * 1e6:9.1f} us {rates} {share:6.1%} of the limit\n")


def report_all(cases: Iterator[Case]) -> None:
    for case in cases:
        report(case.name, case.run, case.work)


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as one CUDA graph: what it takes without the launches. It is called once before, to compile and tune."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


def check_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-2) -> None:
    """Raises AssertionError: nothing is timed that is wrong."""
    torch.testing.assert_close(actual.float().cpu(), expected.float().cpu(), rtol=tolerance, atol=tolerance)
