"""The simulation notices when something is handled within a step that may not be."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest

from penstock.core.ids import AttemptKey
from penstock.testing.scenario import Outcome
from penstock.testing.seeds import run_seed
from penstock.worker import core
from penstock.worker.within_step import Item

SEEDS = range(60)


def take_everything(waiting: deque[Item], *_: str | set[AttemptKey] | bool | None) -> Iterator[Item]:
    while waiting:
        yield waiting.popleft()


def test_simulation_catches_what_ends_a_sequence_within_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "take_now", take_everything)
    failures = [str(result) for result in map(run_seed, SEEDS) if not isinstance(result, Outcome)]
    assert any("within its step" in failure for failure in failures)


def test_simulation_finds_nothing_of_the_kind_as_it_is() -> None:
    assert all(isinstance(result, Outcome) for result in map(run_seed, SEEDS))
