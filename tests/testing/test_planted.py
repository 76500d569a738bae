"""The proof that the checkers can fail: bugs that other systems have had are planted, and each is caught by name."""

from __future__ import annotations

import pytest

from penstock.testing.invariants import INVARIANTS
from penstock.testing.memory_checks import num_elements
from penstock.testing.planted.__main__ import main
from penstock.testing.planted.bug import Bug, Check, Seeds, patched, plants
from penstock.testing.planted.catalog import BUGS, KNOWN_BUGS, NUM_KNOWN
from penstock.testing.scenario import Outcome
from penstock.testing.seeds import run_seed


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught_by_name(name: str) -> None:
    verdict = BUGS[name].catcher.judge(BUGS[name].plant)
    assert verdict.caught, f"{BUGS[name].what}: expected {BUGS[name].catcher}, {verdict.text}"


def test_planted_bugs_are_all_that_are_known() -> None:
    assert list(KNOWN_BUGS) == [str(number) for number in range(1, NUM_KNOWN + 1)]
    assert all("#" in bug.mirrors or "vLLM" in bug.mirrors for bug in KNOWN_BUGS.values())


def test_every_invariant_is_shown_to_break() -> None:
    assert {bug.catcher.name for bug in BUGS.values()} == INVARIANTS.keys()


@pytest.mark.parametrize("bug", [bug for bug in BUGS.values() if isinstance(bug.catcher, Check)], ids=lambda b: b.name)
def test_check_of_its_own_holds_without_its_bug(bug: Bug) -> None:
    assert isinstance(bug.catcher, Check)
    bug.catcher.check()


def test_planted_bug_is_gone_afterwards() -> None:
    with BUGS["28"].plant(), BUGS["31"].plant():
        pass
    assert isinstance(run_seed(5), Outcome)


def test_patched_puts_properties_and_class_methods_back() -> None:
    class Thing:
        @property
        def size(self) -> int:
            return 1

        @classmethod
        def make(cls) -> type:
            return cls

    before = dict(vars(Thing))
    with patched((Thing, "size", lambda _: property(lambda self: 2)), (Thing, "make", lambda _: None)):
        assert Thing().size == 2
    assert dict(vars(Thing)) == before
    assert Thing.make() is Thing


def test_catcher_that_names_another_invariant_has_not_caught_it() -> None:
    bug = BUGS["12"]
    assert not Seeds("I1", range(1, 5)).judge(bug.plant).caught
    assert not Seeds("I14", range(1, 5)).judge(plants()).caught, "nothing is planted"


def test_planted_command_lists_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(bug.mirrors in listed for bug in BUGS.values())
    assert main(["--run", "12", "32"]) == 0
    assert "2 of 2 caught" in capsys.readouterr().out


def test_num_elements_counts_what_objects_hold() -> None:
    holder = Bug("1", "x", "y", plants(), Seeds("I1", [1, 2, 3]))
    small = num_elements(holder)
    assert num_elements([holder, {1: [2, 3]}]) == small + 2 + 1 + 2
