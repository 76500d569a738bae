"""From a model and prompts to a trained draft head. Every part leaves its result in a folder and is not done twice.

1. text: the model answers the prompts (`samples.jsonl`);
2. features: its hidden states over these samples (`features-….safetensors`); one sample in 31 is held out;
3. training, with a checkpoint every hundred batches (`checkpoint.safetensors`);
4. acceptance on what was held out, then the file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from ..core.errors import ConfigError
from ..engine.torch_engine import TorchEngine
from ..models.draft_config import FINAL_NORM, head_config
from ..models.draft_file import load_draft_head, save_draft_head
from ..models.draft_head import DraftHead
from ..models.tokenizer import load_tokenizer
from .batches import epoch_batches, plain_batches
from .evaluation import Acceptance, measure_acceptance
from .features import Example, compute_features, read_examples
from .generation import GenerationPlan, Sample, generate_samples
from .initial import initial_weights, linear_guess
from .memory import give_back
from .prompts import encode_chats, read_chats
from .target import Target, load_target
from .trainer import OptimiserPlan, Trainer
from .vocabulary import coverage, frequent_tokens

Report = Callable[[str, int, int, str], None]  # (part, done, in all, what there is to say)

_HELD_OUT = 31  # every so many samples; odd, so that the temperatures take turns among them as well
_BATCHES_A_CHECKPOINT = 100
_KV_BYTES = 2 << 30
_FEATURES = (FINAL_NORM,)


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """draft_vocab_size and inner: see `head_config`. batch_rows: with padding. start: a head of ours that training goes
    on from, whose sizes and vocabulary it keeps.
    """

    generation: GenerationPlan = field(default_factory=GenerationPlan)
    optimiser: OptimiserPlan = field(default_factory=OptimiserPlan)
    draft_vocab_size: int = 8192
    inner: int = 768
    epochs: int = 2
    batch_rows: int = 2048
    max_prompt_tokens: int = 1024
    max_samples: int | None = None
    start: Path | None = None


class DraftFigures(msgspec.Struct, frozen=True):
    """What a run measured. `acceptance` by kind: greedy or sampled answers, with the prompt's rows or without."""

    num_samples: int
    num_answer_tokens: int
    coverage: float
    acceptance: dict[str, Acceptance]


def train_draft_head(
    model: Path,
    prompts: Sequence[Path],
    out: Path,
    work: Path,
    plan: DraftPlan,
    device: torch.device,
    facts: dict[str, str],
    report: Report,
) -> DraftFigures:
    """Train a head for the model at `model` and write it to `out`, with `facts` and the figures in its metadata.

    `work` holds what has been done so far. Raises ConfigError or ModelFileError.
    """
    work.mkdir(parents=True, exist_ok=True)
    samples = make_samples(model, prompts, work, plan, report)
    learned, held_out = split(samples)
    if not learned or not held_out:
        raise ConfigError(f"{len(samples)} prompts are too few; {_HELD_OUT} or more are needed")
    target = load_target(model, device)

    def say(done: int, total: int) -> None:
        report("features", done, total, "")

    paths = compute_features(target.decoder, samples, _FEATURES, work / "features", say)
    if plan.start is not None:
        trainer = resume_trainer(target, plan.start, plan)
    else:
        draft_ids = choose_vocabulary(target, learned, plan)
        trainer = make_trainer(target, draft_ids, plan, learned_examples(paths, samples))
    run_training(trainer, paths, samples, work / "checkpoint.safetensors", plan, report)
    examples = [e for path in paths for e in read_examples(path, samples, _FEATURES) if is_held_out(e.sample)]
    acceptance = measure_kinds(trainer.head(), examples, plan.batch_rows, device, report)
    answer_tokens = sum(len(sample.output_ids) for sample in samples)
    figures = DraftFigures(len(samples), answer_tokens, round(coverage(held_out, trainer.draft_ids), 4), acceptance)
    measured = json.dumps(msgspec.to_builtins(figures))
    all_facts = {**facts, "target_identity": target.identity, "figures": measured}
    save_draft_head(trainer.head(), out, all_facts, with_lm_head=False)
    return figures


def make_samples(model: Path, prompts: Sequence[Path], work: Path, plan: DraftPlan, report: Report) -> list[Sample]:
    """The model's answers, from `work` or made now."""
    encoded = encode_chats(read_chats(prompts), load_tokenizer(model), plan.max_prompt_tokens)[: plan.max_samples]
    if not encoded:
        raise ConfigError(f"no prompt of at most {plan.max_prompt_tokens} tokens in the files named")

    def make_engine() -> TorchEngine:
        return TorchEngine.load(model, model_name=model.stem, kv_bytes=_KV_BYTES, num_threads=torch.get_num_threads())

    def say(done: int, total: int) -> None:
        report("text", done, total, "")

    threads = torch.get_num_threads()
    samples = generate_samples(make_engine, encoded, work / "samples.jsonl", plan.generation, say)
    torch.set_num_threads(threads)  # the engine takes torch's for its own team
    return samples


def is_held_out(sample: Sample) -> bool:
    return sample.number % _HELD_OUT == _HELD_OUT - 1


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Those to learn from, and those held out."""
    return [s for s in samples if not is_held_out(s)], [s for s in samples if is_held_out(s)]


def choose_vocabulary(target: Target, learned: Sequence[Sample], plan: DraftPlan) -> torch.Tensor:
    size = min(plan.draft_vocab_size, target.config.vocab_size)
    return frequent_tokens(learned, size, target.config.vocab_size, target.config.eos_token_ids)


def learned_examples(paths: Sequence[Path], samples: Sequence[Sample]) -> Iterator[Example]:
    """Those to learn from that have a token to guess, in order."""
    for path in paths:
        for example in read_examples(path, samples, _FEATURES):
            if not is_held_out(example.sample) and len(example.sample.output_ids) > 1:
                yield example


def make_trainer(target: Target, draft_ids: torch.Tensor, plan: DraftPlan, examples: Iterable[Example]) -> Trainer:
    """A trainer at its beginning, which `examples` say."""
    config = head_config(target.config, len(draft_ids), plan.inner)
    fc = linear_guess(examples, target.embedding, config.layer.rms_norm_eps)
    weights = initial_weights(config, fc, plan.optimiser.seed)
    rows = target.lm_head[draft_ids.to(target.lm_head.device)]
    return Trainer(config, weights, target.embedding, rows, draft_ids, plan.optimiser)


def resume_trainer(target: Target, start: Path, plan: DraftPlan) -> Trainer:
    """A trainer that begins with the head at `start`. Raises ModelFileError or ConfigError."""
    head = load_draft_head(start, target.config, target.embedding, target.lm_head)
    if head.config.target_layers != _FEATURES:
        raise ConfigError(
            f"{start}: reads hidden states behind layers {head.config.target_layers}, not the last norm's"
        )
    device = target.lm_head.device
    weights = {name: weight.to(device).requires_grad_() for name, weight in head.weights.items()}
    rows = target.lm_head[head.draft_ids.to(device)]
    return Trainer(head.config, weights, target.embedding, rows, head.draft_ids, plan.optimiser)


def run_training(
    trainer: Trainer,
    paths: Sequence[Path],
    samples: Sequence[Sample],
    checkpoint: Path,
    plan: DraftPlan,
    report: Report,
) -> None:
    """All epochs, or what is left of them behind `checkpoint`."""
    facts = {"plan": repr(plan), "num_samples": str(len(samples))}
    if checkpoint.exists():
        trainer.restore(checkpoint, facts)
    number, seen, total = 0, 0, plan.epochs * sum(len(s.output_ids) > 1 and not is_held_out(s) for s in samples)
    for epoch in range(plan.epochs):
        rng = random.Random(f"{plan.optimiser.seed} {epoch}")
        for batch in epoch_batches(paths, samples, plan.batch_rows, rng, leave_out=is_held_out):
            number += 1
            share = seen / total
            seen += batch.num_sequences
            if number <= trainer.num_done:
                continue
            loss = trainer.train(batch, share)
            report("training", seen, total, f"loss {loss:.3f}")
            if number % _BATCHES_A_CHECKPOINT == 0 or seen == total:
                trainer.save(checkpoint, facts)
                give_back()


def measure_kinds(
    head: DraftHead, examples: Sequence[Example], batch_rows: int, device: torch.device, report: Report
) -> dict[str, Acceptance]:
    """Acceptance over `examples` of each kind that there is."""
    found: dict[str, Acceptance] = {}
    for name, is_greedy in (("greedy", True), ("sampled", False)):
        kind = [example for example in examples if (example.sample.temperature == 0) == is_greedy]
        for where, skips in (("", False), (", prompt unseen", True)):
            batches = (batch.to(device, head.lm_head.dtype) for batch in plain_batches(kind, batch_rows, skips))
            if kind:
                found[name + where] = measure_acceptance(head, batches)
            report("acceptance", 2 * (not is_greedy) + skips + 1, 4, "")
    return found
