"""From the name of a model to its files on this disk, with a progress bar while they come."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ..core.config import SpeculationConfig, Topology
    from ..models.store import ModelPath


def local_model(source: str) -> ModelPath:
    """The model's files, fetched first when they are not here. Raises ConfigError or ModelFileError."""
    from ..models.store import resolve

    with progress_bar(f"fetching {source}") as report:
        return resolve(source, progress=report)


def use_threads(num_threads: int) -> None:
    """For this process, before torch is imported: its thread library reads these settings then."""
    from ..engine.threads import thread_environment

    for name, value in thread_environment(num_threads).items():
        os.environ.setdefault(name, value)


def with_local_model(topology: Topology) -> Topology:
    """`topology` with the path of its model on this disk, and the name that clients call it."""
    model = local_model(topology.model.source)
    name = topology.model.name or model.name
    topology = replace(topology, model=replace(topology.model, source=str(model.path), name=name))
    return replace(
        topology, speculation=replace(topology.speculation, method=local_method(topology.speculation, model.path))
    )


def local_method(speculation: SpeculationConfig, model: Path) -> str:
    """The method that drafts for `model`, with a path on this disk where it names files. Raises ConfigError."""
    if speculation.draft_source is not None:
        draft = local_model(speculation.draft_source)
        _check_vocabulary(model, draft.path)
        return f"draft:{draft.path}"
    if speculation.head_source is not None:
        return f"eagle:{_head_path(speculation.head_source)}"
    return speculation.method


def _head_path(source: str) -> Path:
    """Raises ConfigError where nothing is there."""
    from pathlib import Path

    from ..core.errors import ConfigError

    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise ConfigError(f"speculation.method: there is no draft head at {path}")
    return path


def _check_vocabulary(model: Path, draft: Path) -> None:
    """A draft names tokens by their ids, so these must mean the same. Raises ConfigError."""
    from ..core.errors import ConfigError
    from ..models.tokenizer import load_tokenizer

    ours, theirs = load_tokenizer(model), load_tokenizer(draft)
    if ours.vocabulary() != theirs.vocabulary():
        raise ConfigError(
            f"speculation.method: {draft} has another vocabulary than {model}; a draft model needs the same tokens"
        )


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Takes (bytes done, bytes in total); draws on stderr from the first call on: a bar on a terminal, else a line."""
    if not sys.stderr.isatty():
        yield _Announcement(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(title, total=None, visible=False)
        yield lambda done, total: bars.update(task, completed=done, total=total, visible=True)


class _Announcement:
    """Says once that something is on its way."""

    def __init__(self, title: str) -> None:
        self._title = title

    def __call__(self, done: int, total: int) -> None:
        if self._title:
            print(f"{self._title} ({total / 1e6:.0f} MB)", file=sys.stderr)
            self._title = ""
