"""`penstock train-draft`: a draft head for a model, from prompts to a file."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.store import DEFAULT_MODEL
from .arguments import Commands, Parser, add_command, number, whole_number
from .errors import USAGE, CliError
from .terminal import table

if TYPE_CHECKING:
    from ..training.draft_training import DraftFigures, DraftPlan, Report

_DETAILS = """\
A draft head guesses tokens ahead of the model, so that one step of the model verifies several. The model answers the
prompts; the head learns to foresee these answers; one sample in 31 is held out, and how many guesses are right on those
is printed and written into the file. A run that is cut goes on where it was when it is started again.

Prompts are JSON lines, .gz or not: an object with `messages`, or the text under `prompt`, `question` or `turns`."""


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train-draft",
        run,
        "Train a draft head for speculative decoding.",
        _DETAILS,
        "penstock train-draft --prompts prompts.jsonl --out head.safetensors",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        default=DEFAULT_MODEL,
        help=f"name, folder, .gguf file or hf:org/name (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--prompts", nargs="+", type=Path, required=True, metavar="FILE", help="files of prompts")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    _add_text_options(parser)
    _add_head_options(parser)


def _add_text_options(parser: Parser) -> None:
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="where text, features and checkpoints are kept (default: OUT.work)"
    )
    parser.add_argument(
        "--samples", type=whole_number(31, 1 << 30), metavar="N", help="most prompts to answer (default: all)"
    )
    parser.add_argument(
        "--max-prompt-tokens",
        type=whole_number(1, 1 << 20),
        default=1024,
        metavar="N",
        help="longer prompts are left out (default: 1024)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=whole_number(2, 1 << 20),
        default=320,
        metavar="N",
        help="longest answer, in tokens (default: 320)",
    )
    parser.add_argument(
        "--temperature",
        type=number(0, 100),
        default=0.7,
        metavar="T",
        help="of every other answer; the rest are greedy (default: 0.7)",
    )


def _add_head_options(parser: Parser) -> None:
    parser.add_argument(
        "--draft-vocab",
        type=whole_number(2, 1 << 24),
        default=8192,
        metavar="N",
        help="tokens that can be drafted: the most frequent (default: 8192)",
    )
    parser.add_argument(
        "--inner", type=whole_number(32, 1 << 20), default=768, metavar="N", help="width of its MLP (default: 768)"
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="HEAD",
        help="a trained head to go on from, with its sizes and vocabulary (default: a new one)",
    )
    parser.add_argument(
        "--steps", type=whole_number(1, 8), default=4, metavar="N", help="guesses unrolled in training (default: 4)"
    )
    parser.add_argument(
        "--epochs", type=whole_number(1, 1000), default=2, metavar="N", help="passes over the samples (default: 2)"
    )
    parser.add_argument(
        "--learning-rate", type=number(1e-6, 1), default=1e-3, metavar="R", help="the highest (default: 0.001)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto, CUDA where there is one)"
    )
    parser.add_argument(
        "--threads", type=whole_number(1, 4096), metavar="N", help="compute threads (default: every core)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0, 1 << 62), default=0, metavar="N", help="of draws and training (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON object")


def run(args: argparse.Namespace) -> int:
    from ..core.logging import setup_logging
    from ..deploy.launch import available_cores
    from .model_files import local_model, use_threads

    setup_logging("train-draft", "warning")
    _check_paths(args)
    model = local_model(args.model)
    threads = args.threads or available_cores()
    use_threads(threads)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # every batch has other sizes: few are met again
    import msgspec
    import torch

    from ..training.draft_training import train_draft_head
    from ..training.target import resolve_device

    torch.set_num_threads(threads)
    work = args.work or args.out.with_name(args.out.name + ".work")
    device, plan = resolve_device(args.device), _plan(args)
    with _report() as report:
        figures = train_draft_head(model.path, args.prompts, args.out, work, plan, device, _facts(args), report)
    print(msgspec.json.format(msgspec.json.encode(figures)).decode() if args.json else _as_table(figures))
    return 0


def _check_paths(args: argparse.Namespace) -> None:
    for option, path in [*(("--prompts", path) for path in args.prompts), ("--start", args.start)]:
        if path is not None and not path.is_file():
            raise CliError(f"{option}: there is no file {path}", exit_code=USAGE)
    if args.out.suffix != ".safetensors" or not args.out.absolute().parent.is_dir():
        raise CliError(f"--out: {args.out} is not a .safetensors file in a folder that exists", exit_code=USAGE)


def _plan(args: argparse.Namespace) -> DraftPlan:
    from ..training.draft_training import DraftPlan
    from ..training.generation import GenerationPlan
    from ..training.trainer import OptimiserPlan

    temperatures = (0.0, args.temperature) if args.temperature else (0.0,)
    return DraftPlan(
        generation=GenerationPlan(max_new_tokens=args.max_new_tokens, temperatures=temperatures, seed=args.seed),
        optimiser=OptimiserPlan(num_steps=args.steps, learning_rate=args.learning_rate, seed=args.seed),
        draft_vocab_size=args.draft_vocab,
        inner=args.inner,
        epochs=args.epochs,
        max_prompt_tokens=args.max_prompt_tokens,
        max_samples=args.samples,
        start=args.start,
    )


def _facts(args: argparse.Namespace) -> dict[str, str]:
    """Where the head is from, for its file. Paths are left out: they say nothing elsewhere."""
    from .. import __version__

    names = " ".join(path.name for path in args.prompts)
    settings = ("draft_vocab", "inner", "steps", "epochs", "learning_rate", "temperature", "max_new_tokens")
    options = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in settings)
    command = f"penstock train-draft {Path(args.model).name} --prompts {names} {options} --seed {args.seed}"
    facts = {"command": command, "seed": str(args.seed), "version": __version__, "commit": _commit()}
    if args.start is None:
        return facts
    from ..models.draft_file import read_facts

    before = read_facts(args.start).get("command", "unknown")
    return facts | {"command": f"{command} --start {args.start.name}", "start_command": before}


def _commit() -> str:
    """Of the sources this runs from; "unknown" outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


@contextmanager
def _report() -> Iterator[Report]:
    """Shows each part on stderr: a bar on a terminal, else a line for each tenth."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<11}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bars:
        tasks = {}

        def report(part: str, done: int, total: int, note: str) -> None:
            if part not in tasks:
                tasks[part] = bars.add_task(part, total=total, note=note)
            bars.update(tasks[part], completed=done, total=total, note=note)

        yield report


class _Lines:
    """One line for each tenth of a part."""

    def __init__(self) -> None:
        self._said: set[tuple[str, int]] = set()

    def __call__(self, part: str, done: int, total: int, note: str) -> None:
        tenth = 10 * done // max(total, 1)
        if (part, tenth) not in self._said:
            self._said.add((part, tenth))
            print(f"{part}: {done} of {total}{', ' + note if note else ''}", file=sys.stderr, flush=True)


def _as_table(figures: DraftFigures) -> str:
    header = ("HELD-OUT ANSWERS", "TOKENS", "RIGHT AT 1", "2", "3", "4", "5", "TOKENS A STEP, k=1", "3", "5")
    rows = [
        (
            kind,
            str(found.num_tokens),
            *(f"{rate:.1%}" for rate in found.position_rates),
            *(f"{found.tokens_per_step[k]:.2f}" for k in (0, 2, 4)),
        )
        for kind, found in figures.acceptance.items()
    ]
    facts = (
        f"{figures.num_samples} samples, {figures.num_answer_tokens} tokens of answers; of the tokens held out "
        f"{figures.coverage:.1%} can be drafted"
    )
    return f"{table([header, *rows], right=frozenset(range(1, len(header))))}\n{facts}"
