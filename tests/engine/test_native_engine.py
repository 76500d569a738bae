"""The real model from its stored weights: natively, and as it is computed where there is no native library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.engine.batch import build_batch
from penstock.engine.model_runner import ModelRunner
from penstock.engine.torch_engine import TorchEngine
from penstock.kernels.native import library
from penstock.models.tokenizer import load_tokenizer
from penstock.testing.stepper import Stepper

from ..kernels.native_levels import at_level

TEXT = """A penstock is the pipe that carries water from a reservoir to the turbine of a power station. Long before
there were turbines, mills used a gate of the same name to let just as much water onto the wheel as the work of the day
needed. The miller opened it in the morning, listened to the stones, and closed it a little when they ran too fast. One
day in spring, when the snow had melted in the hills, the water came over the dam, and he had to ask for help."""


def predictions(engine: TorchEngine, token_ids: list[int]) -> torch.Tensor:
    """Logits behind every token of a text."""
    stepper = Stepper(engine.spec.num_blocks, engine.spec.block_size)
    batch = build_batch([stepper.schedule(stepper.add(token_ids))], engine.spec.block_size)
    runner: ModelRunner = engine._runner
    return runner.run(replace(batch, sampled_rows=np.arange(len(token_ids)))).float()


def load(path: Path, level: str, **settings: str) -> TorchEngine:
    with at_level(level):
        return TorchEngine.load(path, model_name="m", num_blocks=64, num_threads=2, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def best() -> str:
    found = [name for name in library.usable_levels() if library._path(name) is not None]
    if not found:
        pytest.skip("no native kernels here")
    return found[0]


def test_engine_is_native_by_itself_and_says_so(model_path: Path, best: str) -> None:
    engine = load(model_path, best)
    assert (engine.is_native, engine.native_level, engine.quantization) == (True, best, "grouped")
    assert engine.spec.fingerprint.dtype == "bfloat16"


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"quantization": "none"}])
def test_engine_computes_in_a_dtype_when_it_is_told_so(model_path: Path, best: str, settings: dict[str, str]) -> None:
    engine = load(model_path, best, **settings)
    assert (engine.is_native, engine.quantization) == (False, "none")


def test_without_the_library_the_tokens_are_the_same_but_for_near_ties(model_path: Path, best: str) -> None:
    """Expanded weights in torch, with rows in bfloat16 in place of 8 bits; a tie is what 8 bits can turn over."""
    token_ids = load_tokenizer(model_path).encode(TEXT)
    with at_level("off"):
        absent = TorchEngine.load(model_path, model_name="m", num_blocks=64, num_threads=2)
        assert not absent.is_native
        expected = predictions(absent, token_ids)
    native = predictions(load(model_path, best), token_ids)
    first, second = expected.topk(2, dim=-1).values.unbind(dim=-1)
    is_equal = native.argmax(dim=-1) == expected.argmax(dim=-1)
    assert is_equal[first - second > 0.5].all()
    assert is_equal.float().mean() > 0.9


def test_unknown_quantization_is_refused(model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization: 'int3' is not one of auto, none, int8"):
        TorchEngine.load(model_path, model_name="m", num_blocks=4, quantization="int3")
