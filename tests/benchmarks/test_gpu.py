"""The GPU benchmark cannot measure here; that it says so, and that what it times is right, can be shown anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from penstock.benchmarks import gpu_decode
from penstock.benchmarks.gpu_figures import Figure, table
from penstock.benchmarks.gpu_peer import _late_gaps
from penstock.models.device_decoder import make_pool
from penstock.models.weight_shapes import weight_shapes
from penstock.testing.tiny_model import tiny_config

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to measure")
def test_without_a_device_it_says_what_it_needs(repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, repo_root / "benchmarks" / "gpu.py", "--quick"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu: a kernel is measured on a CUDA device")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_network_is_compared_with_torch(architecture: str) -> None:
    apart = gpu_decode.check_network(tiny_config(architecture), 21, CPU, torch.float32)
    assert 0 < apart < 1e-4


def test_wrong_network_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "plain_logits", lambda config, weights, ids: torch.randn(1, config.vocab_size))
    with pytest.raises(AssertionError, match="logits differ from torch's"):
        gpu_decode.check_network(tiny_config(), 21, CPU, torch.float32)


def test_decode_steps_run_and_their_floor_counts_every_byte() -> None:
    config = tiny_config()
    decoder = gpu_decode.random_network(config, 40, CPU, torch.float32)
    pool = make_pool(config, 3 * 3, gpu_decode.BLOCK_SIZE, torch.float32, CPU)
    assert gpu_decode.step_seconds(decoder, pool, 3, 36, 4) > 0
    shapes = {name: shape for name, shape in weight_shapes(config).items() if len(shape) == 2}
    del shapes["model.embed_tokens.weight"]
    weights = sum(4 * rows * columns for rows, columns in shapes.values())
    a_token = 4 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    assert gpu_decode.floor_bytes(decoder, pool, 3, 38) == weights + 3 * 38 * a_token


def test_llama_8b_has_eight_billion_weights() -> None:
    shapes = weight_shapes(gpu_decode.LLAMA_8B).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == 8_030_261_248


def test_table_gives_share_bar_and_others() -> None:
    figures = [Figure("a", 2e-3, 1e-3, 0.85, {"torch": 3e-3}), Figure("b", 1e-3, 9e-4, 0.85), Figure("c", 1e-3, 1e-4)]
    assert table(figures).splitlines()[2:] == [
        "| a | 2000.0 | 50.0% | 85% | missed | torch 3000.0 |",
        "| b | 1000.0 | 90.0% | 85% | met |  |",
        "| c | 1000.0 | 10.0% |  | no bar |  |",
    ]
    assert figures[0].record()["share"] == 0.5


def test_gaps_of_a_peer_are_those_of_the_later_half() -> None:
    assert _late_gaps(SimpleNamespace(timestamps=[0.0, 5.0, 6.0, 6.5, 7.5])) == [0.5, 1.0]
    assert _late_gaps(object()) == []
