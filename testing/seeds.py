"""One seed or many, each with its verdict and the line that plays it again."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from .history import HistoryWriter
from .neighbours import run_scenario_beside_alone
from .scenario import Outcome, draw_scenario

CHUNK = 16

Plant = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Failure:
    """What broke: `name` is the invariant's (I1 … I15), or the type of an error that has none."""

    seed: int
    name: str
    text: str
    bug: str | None = None

    def __str__(self) -> str:
        return f"{self.text}\n  seed {self.seed}: {replay_command(self.seed, self.bug)}"


def replay_command(seed: int, bug: str | None = None) -> str:
    return f"python -m penstock.testing.simulate --seed {seed} --trace" + (f" --bug {bug}" if bug else "")


def run_seed(
    seed: int,
    *,
    bug: str | None = None,
    plant: Plant = nullcontext,
    trace: Callable[[str], None] | None = None,
    history: HistoryWriter | None = None,
) -> Outcome | Failure:
    """The outcome of one seed, or what broke. `plant` holds a bug in place while it runs, which `bug` names."""
    try:
        with quiet(), plant():
            return run_scenario_beside_alone(draw_scenario(seed), trace, history)
    except Exception as error:  # noqa: BLE001  a crash of the system under test is a finding like any other
        return _failure(seed, bug, error)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is logged meanwhile: faults are what is wanted here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _failure(seed: int, bug: str | None, error: Exception) -> Failure:
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{where.filename.rsplit('/', 1)[-1]}:{where.lineno}"
    name = getattr(error, "name", None) or type(error).__name__
    text = str(error) if name.startswith("I") and name[1:].isdigit() else f"{type(error).__name__}: {error}"
    return Failure(seed, name, f"{text} ({place})", bug)


def run_seeds(
    seeds: Iterable[int], *, bug: str | None = None, plant: Plant = nullcontext, processes: int = 1
) -> Iterator[Outcome | Failure]:
    """The verdict of each seed, in order, as they come. With several processes `plant` has to be importable."""
    one = partial(run_seed, bug=bug, plant=plant)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            yield from pool.map(one, seeds, chunksize=CHUNK)
    else:
        yield from map(one, seeds)
