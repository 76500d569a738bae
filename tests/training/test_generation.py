"""Training text is what the model says, whatever runs beside it, and survives a cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError
from penstock.engine.interface import Engine
from penstock.engine.torch_engine import TorchEngine
from penstock.testing.stepper import Stepper
from penstock.training.generation import GenerationPlan, generate_samples, read_samples

PLAN = GenerationPlan(max_new_tokens=12, temperatures=(0.0, 0.8), seed=9, num_lanes=3, chunk=4)
PROMPTS = [[(3 * i + j) % 127 + 1 for j in range(1 + i % 6)] for i in range(11)]


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> TorchEngine:
    return TorchEngine.load(tiny_folder, model_name="tiny", dtype="float32", num_blocks=40, block_size=4)


def alone(engine: TorchEngine, number: int) -> list[int]:
    """The answer to one prompt with nothing beside it."""
    stepper = Stepper(40, 4)
    seq = stepper.add(PROMPTS[number], PLAN.params(number))
    stepper.generate(engine, [seq], PLAN.max_new_tokens)
    end = next((i + 1 for i, token in enumerate(seq.output_ids) if token == 0), PLAN.max_new_tokens)
    return seq.output_ids[:end]


def test_samples_are_what_each_prompt_gets_alone(engine: TorchEngine, tmp_path: Path) -> None:
    samples = generate_samples(lambda: engine, PROMPTS, tmp_path / "s.jsonl", PLAN)
    assert [sample.output_ids for sample in samples] == [alone(engine, number) for number in range(len(PROMPTS))]
    assert [sample.prompt_ids for sample in samples] == PROMPTS
    assert [sample.temperature for sample in samples] == [0.0, 0.8] * 5 + [0.0]


def test_samples_come_back_from_their_file(engine: TorchEngine, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    samples = generate_samples(lambda: engine, PROMPTS, path, PLAN)
    assert sorted(read_samples(path), key=lambda sample: sample.number) == samples


def test_run_that_was_cut_goes_on_behind_what_is_there(engine: TorchEngine, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    samples = generate_samples(lambda: engine, PROMPTS, whole, PLAN)
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:4]) + lines[4][:-3])
    assert len(list(read_samples(cut))) == 4
    assert generate_samples(lambda: engine, PROMPTS, cut, PLAN) == samples
    assert sorted(read_samples(cut), key=lambda sample: sample.number) == samples


def test_finished_file_needs_no_engine(engine: TorchEngine, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    samples = generate_samples(lambda: engine, PROMPTS, path, PLAN)
    assert generate_samples(refuse, PROMPTS, path, PLAN) == samples


def refuse() -> Engine:
    raise AssertionError("an engine was made")


def other_prompt(line: list[object]) -> list[object]:
    return [line[0], line[1], [99], line[3]]


def other_temperature(line: list[object]) -> list[object]:
    return [line[0], 0.3, line[2], line[3]]


def other_number(line: list[object]) -> list[object]:
    return [50, line[1], line[2], line[3]]


@pytest.mark.parametrize("change", [other_prompt, other_temperature, other_number])
def test_file_of_another_run_is_refused(
    engine: TorchEngine, tmp_path: Path, change: Callable[[list[object]], list[object]]
) -> None:
    path = tmp_path / "s.jsonl"
    generate_samples(lambda: engine, PROMPTS, path, PLAN)
    first = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps(change(first)) + "\n")
    with pytest.raises(ConfigError, match="holds samples of other prompts"):
        generate_samples(refuse, PROMPTS, path, PLAN)


def test_prompt_that_no_pool_holds_is_refused(engine: TorchEngine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="172 tokens of prompt and answer, the engine holds 160"):
        generate_samples(lambda: engine, [[1] * 160], tmp_path / "s.jsonl", PLAN)
