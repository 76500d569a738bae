"""Damage on the way is noticed, all of it, and nothing else is."""

from __future__ import annotations

import random

import pytest

from penstock.testing.corruption import SPOILERS, main, run


@pytest.mark.slow
def test_ten_thousand_faults_are_noticed_and_no_sound_block_is_suspected() -> None:
    tally = run(10_000, 100_000)
    assert tally.faults.total() == 10_000
    assert len(tally.faults) == len(SPOILERS)
    assert tally.sound >= 100_000
    assert (tally.missed, tally.suspected) == (0, 0)


def test_fault_that_changes_nothing_is_counted_as_missed() -> None:
    """The tally can fail: a spoiler that does not spoil."""

    def nothing(views: list[memoryview], rng: random.Random) -> None:
        return

    assert run(5, 0, spoilers=[nothing]).missed == 5


def test_command_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--faults", "40", "--sound", "80"]) == 0
    assert "40 of 40 faults noticed" in capsys.readouterr().out
