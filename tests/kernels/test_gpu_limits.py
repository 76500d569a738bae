"""The benchmarks cannot run without a device; that they say so, and how they count, can be shown anywhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.kernels import gpu_limits
from penstock.kernels.gpu_limits import Work, check_close, report

WITH_OPTIONS = {"paged_attention"}  # it parses a command line, and is tested with its kernels
BENCHES = sorted({path.parent.name for path in Path(gpu_limits.__file__).parent.glob("*/bench.py")} - WITH_OPTIONS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to measure")
@pytest.mark.parametrize("name", BENCHES)
def test_bench_without_a_device_says_what_it_needs(name: str) -> None:
    main = importlib.import_module(f"penstock.kernels.{name}.bench").main
    with pytest.raises(ConfigError, match="run this on a GPU machine"):
        main()


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (Work(10**9), r"2000\.0 us +500\.0 GB/s +25\.0% of the limit"),
        (Work(10**9, 10**12), r"500\.0 GB/s +500\.00 TFLOP/s +50\.0% of the limit"),
    ],
)
def test_share_is_of_the_limit_that_is_met_first(
    work: Work, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 ms a call, on a device of 2 TB/s and 1000 TFLOP/s."""
    monkeypatch.setattr(gpu_limits, "seconds", lambda run: 2e-3)
    monkeypatch.setattr(gpu_limits, "bytes_per_second", lambda: 2e12)
    monkeypatch.setattr(gpu_limits, "operations_per_second", lambda: 1e15)
    report("op", lambda: None, work)
    assert re.search(expected, capsys.readouterr().out)


def test_wrong_result_is_not_timed() -> None:
    with pytest.raises(AssertionError):
        check_close(torch.ones(2), torch.zeros(2))
