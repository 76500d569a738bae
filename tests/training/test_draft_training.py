"""Training as a whole on a tiny model: it learns, it is the same twice, a cut loses nothing, and the command runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from penstock.cli.main import main
from penstock.core.errors import ConfigError
from penstock.models.draft_config import FINAL_NORM
from penstock.models.draft_file import load_draft_head, read_facts
from penstock.training.batches import plain_batches
from penstock.training.draft_training import DraftFigures, DraftPlan, make_trainer, train_draft_head
from penstock.training.features import Example, read_examples
from penstock.training.generation import GenerationPlan, Sample, read_samples
from penstock.training.target import load_target
from penstock.training.trainer import OptimiserPlan, Trainer
from penstock.training.vocabulary import coverage, frequent_tokens

CPU = torch.device("cpu")
PLAN = DraftPlan(
    generation=GenerationPlan(max_new_tokens=16),
    optimiser=OptimiserPlan(num_steps=3, learning_rate=3e-3, warmup=3),
    draft_vocab_size=96,
    inner=64,
    epochs=6,
    batch_rows=128,
)


def train(model: Path, prompts: Path, folder: Path, plan: DraftPlan = PLAN) -> tuple[DraftFigures, list[float]]:
    losses: list[float] = []

    def report(part: str, done: int, total: int, note: str) -> None:
        if part == "training":
            losses.append(float(note.removeprefix("loss ")))

    folder.mkdir(exist_ok=True)
    facts = {"command": "test"}
    figures = train_draft_head(model, [prompts], folder / "h.safetensors", folder / "w", plan, CPU, facts, report)
    return figures, losses


def test_training_learns_and_is_the_same_twice(tiny_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    figures, losses = train(tiny_folder, prompt_file, tmp_path / "a")
    assert sum(losses[-4:]) / 4 < 0.85 * sum(losses[:4]) / 4
    again, same = train(tiny_folder, prompt_file, tmp_path / "b")
    assert losses == same
    assert figures == again
    first, second = (load_file(tmp_path / name / "h.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    _, other = train(tiny_folder, prompt_file, tmp_path / "c", replace(PLAN, optimiser=replace(PLAN.optimiser, seed=1)))
    assert other != losses


def test_run_that_was_cut_ends_as_if_it_were_not(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.training.draft_training._BATCHES_A_CHECKPOINT", 4)
    figures, losses = train(tiny_folder, prompt_file, tmp_path / "whole")
    train_one, count = Trainer.train, 0

    def cut(self: Trainer, *args: object) -> float:
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        return train_one(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_folder, prompt_file, tmp_path / "cut")
    monkeypatch.setattr(Trainer, "train", train_one)
    again, rest = train(tiny_folder, prompt_file, tmp_path / "cut")
    assert rest == losses[4:]
    assert again == figures
    with pytest.raises(ConfigError, match="of a run with other settings"):
        train(tiny_folder, prompt_file, tmp_path / "cut", replace(PLAN, inner=96))


def test_head_that_was_written_loads_and_is_the_trained_one(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    figures, _ = train(tiny_folder, prompt_file, tmp_path)
    target = load_target(tiny_folder, CPU)
    head = load_draft_head(tmp_path / "h.safetensors", target.config, target.embedding, target.lm_head)
    facts = read_facts(tmp_path / "h.safetensors")
    assert facts["target_identity"] == target.identity
    assert facts["command"] == "test"
    assert json.loads(facts["figures"])["coverage"] == figures.coverage
    assert figures.acceptance.keys() == {f"{k}{w}" for k in ("greedy", "sampled") for w in ("", ", prompt unseen")}
    assert head.config.target_layers == (FINAL_NORM,)
    assert 0 in head.draft_ids  # the end of an answer
    trained = make_trainer(target, head.draft_ids, PLAN, [])
    trained.restore(tmp_path / "w" / "checkpoint.safetensors", {"plan": repr(PLAN), "num_samples": "62"})
    for name, weight in head.weights.items():
        assert torch.equal(weight, trained.weights[name].detach().to(torch.bfloat16).float())


def test_training_goes_on_from_a_head(tiny_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    """Without learning anything more it is that head."""
    train(tiny_folder, prompt_file, tmp_path)
    start = tmp_path / "h.safetensors"
    still = replace(PLAN.optimiser, learning_rate=0.0, weight_decay=0.0)
    train(tiny_folder, prompt_file, tmp_path / "more", replace(PLAN, start=start, optimiser=still, inner=32, epochs=1))
    with safe_open(start, "pt") as before, safe_open(tmp_path / "more" / "h.safetensors", "pt") as after:
        assert set(before.keys()) == set(after.keys())
        assert all(torch.equal(before.get_tensor(name), after.get_tensor(name)) for name in before.keys())  # noqa: SIM118


def test_few_prompts_are_refused(tiny_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="30 prompts are too few; 31 or more are needed"):
        train(tiny_folder, prompt_file, tmp_path, replace(PLAN, max_samples=30))
    with pytest.raises(ConfigError, match="no prompt of at most 1 tokens"):
        train(tiny_folder, prompt_file, tmp_path / "x", replace(PLAN, max_prompt_tokens=1))


def test_rows_before_the_answer_and_tokens_that_cannot_be_drafted_do_not_count(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path
) -> None:
    train(tiny_folder, prompt_file, tmp_path, replace(PLAN, epochs=1))
    samples = sorted(read_samples(tmp_path / "w" / "samples.jsonl"), key=lambda sample: sample.number)
    (path,) = (tmp_path / "w" / "features").glob("*.safetensors")
    example = next(
        example for example in read_examples(path, samples, (FINAL_NORM,)) if len(example.sample.output_ids) > 4
    )
    target = load_target(tiny_folder, CPU)
    drafted = torch.tensor(sorted(set(example.sample.output_ids[2:])))
    losses = []
    for change in (False, True):
        sample = example.sample
        if change:  # another target state before the answer, and where a token cannot be drafted
            final = example.final.clone()
            final[: len(sample.prompt_ids)] += 3
            example = Example(sample, example.features, final)
        trainer = make_trainer(target, drafted, PLAN, [example])
        (batch,) = plain_batches([example], 999, skips_prompt=False)
        losses.append(trainer.train(batch.to(CPU, trainer.dtype), 0.0))
    assert example.sample.output_ids[1] in drafted or losses[0] == losses[1]
    assert losses[0] > 0


def test_vocabulary_holds_the_most_frequent_tokens() -> None:
    samples = [Sample(0, 0.0, [9, 9, 9], [5, 5, 7, 3]), Sample(1, 0.0, [], [7, 5, 2])]
    assert frequent_tokens(samples, 3, 10, always=[8]).tolist() == [5, 7, 8]
    assert frequent_tokens(samples, 4, 10).tolist() == [2, 3, 5, 7]
    assert coverage(samples, torch.tensor([5, 7])) == pytest.approx(5 / 7)


def test_command_trains_and_prints_the_figures(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "head.safetensors"
    options = ["--prompts", str(prompt_file), "--out", str(out), "--threads", "1", "--max-new-tokens", "8"]
    options += ["--inner", "64", "--draft-vocab", "64", "--epochs", "1", "--steps", "2"]
    assert main(["train-draft", str(tiny_folder), *options]) == 0
    captured = capsys.readouterr()
    assert "HELD-OUT ANSWERS" in captured.out
    assert "training: " in captured.err
    facts = read_facts(out)
    assert facts["command"].startswith("penstock train-draft tiny")
    assert "--draft-vocab 64" in facts["command"]
    assert str(tmp_path) not in json.dumps(facts)
    assert main(["train-draft", str(tiny_folder), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 62


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"--prompts": "none.jsonl"}, "--prompts: there is no file none.jsonl"),
        ({"--start": "none.safetensors"}, "--start: there is no file none.safetensors"),
        ({"--out": "head.bin"}, "--out: head.bin is not a .safetensors file in a folder that exists"),
        ({"--out": "no/where.safetensors"}, "is not a .safetensors file in a folder that exists"),
    ],
)
def test_command_names_what_is_wrong(
    tiny_folder: Path,
    prompt_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    problem: str,
) -> None:
    options = {"--prompts": str(prompt_file), "--out": str(tmp_path / "h.safetensors"), "--threads": "1"} | change
    argv = [word for pair in options.items() for word in pair]
    assert main(["train-draft", str(tiny_folder), *argv]) == 2
    assert problem in capsys.readouterr().err
