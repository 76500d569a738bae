"""What a planted bug is, how it is put in place, and who must catch it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ..invariants import InvariantBroken
from ..seeds import Failure, quiet, run_seed

Wrap = Callable[[Any], Any]  # the original attribute → what stands in its place
Plant = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`caught`: a failure was found that bears the right name; `text` is the failure, or why there is none."""

    caught: bool
    text: str


@dataclass(frozen=True, slots=True)
class Seeds:
    """Seeds of the simulation, of which one must break invariant `name`. That a bug breaks others too is no wonder."""

    name: str
    seeds: Iterable[int]

    def judge(self, plant: Plant) -> Verdict:
        others: list[str] = []
        for seed in self.seeds:
            result = run_seed(seed, plant=plant)
            if isinstance(result, Failure) and result.name == self.name:
                return Verdict(True, f"seed {seed}: {result.text}")
            others += [result.text] if isinstance(result, Failure) else []
        return Verdict(False, f"no seed names it; {len(others)} name something else: {others[:1]}")

    def __str__(self) -> str:
        return f"{self.name} in the simulation"


@dataclass(frozen=True, slots=True)
class Check:
    """A check of its own for what the simulation does not reach; holds without the bug, breaks `name` with it."""

    name: str
    check: Callable[[], None]

    def judge(self, plant: Plant) -> Verdict:
        with quiet():
            return self._judge(plant)

    def _judge(self, plant: Plant) -> Verdict:
        try:
            self.check()
        except InvariantBroken as error:
            return Verdict(False, f"the check fails without the bug too: {error}")
        try:
            with plant():
                self.check()
        except InvariantBroken as error:
            return Verdict(error.name == self.name, str(error))
        return Verdict(False, "the check does not notice it")

    def __str__(self) -> str:
        return f"{self.name} by {self.check.__name__}"


@dataclass(frozen=True, slots=True)
class Bug:
    """`name`: its number among the known bugs, or a word for one of our own; `mirrors`: where it has been seen.

    `what` is wrong with the system while `plant` holds it in place.
    """

    name: str
    mirrors: str
    what: str
    plant: Plant
    catcher: Seeds | Check


@contextmanager
def patched(*patches: tuple[Any, str, Wrap]) -> Iterator[None]:
    """With these attributes (of classes or modules) replaced by what each wrap makes of the original."""
    with ExitStack() as undo:
        for owner, name, wrap in patches:
            # Not getattr: a class method, static method or property must go back as it was.
            original = vars(owner)[name]
            undo.callback(setattr, owner, name, original)
            setattr(owner, name, wrap(original))
        yield


def plants(*patches: tuple[Any, str, Wrap]) -> Plant:
    """A plant that may be used again and again, each time from a fresh start."""
    return lambda: patched(*patches)
