"""Simulated clusters whose workers share one memory: no block is lost or owned twice, whatever happens to whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from penstock.core.ids import BlockId
from penstock.kvtransfer.ownership import Ownership, Settled
from penstock.testing.chaos import ChaosProfile
from penstock.testing.invariants import InvariantBroken
from penstock.testing.scenario import Scenario, draw_scenario, run_scenario


def scenario_of(seed: int) -> Scenario:
    scenario = draw_scenario(seed)
    return replace(scenario, shape=replace(scenario.shape, one_pool=True))


def run(seeds: Iterable[int]) -> Counter[str]:
    return sum((run_scenario(scenario_of(seed)).faults for seed in seeds), Counter())


def test_some_seeds_share_one_memory_and_some_do_not() -> None:
    shared = [draw_scenario(seed).shape.one_pool for seed in range(100)]
    assert 10 < sum(shared) < 50


def test_blocks_are_given_and_none_is_lost() -> None:
    faults = run(range(40))
    assert faults["given block"] > 100
    assert faults["kill"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_hundred_seeds_with_one_memory_hold_every_invariant() -> None:
    faults = run(range(1000, 1300))
    assert faults["given block"] > 1000
    assert {"kill", "freeze", "hang", "drain"} <= set(faults)


def test_perfect_cluster_that_keeps_no_prefix_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what another sequence reads at the same time has to stay; one request alone leaves no such block."""
    num_given = 0
    for seed in range(0, 100, 10):
        scenario = scenario_of(seed)
        shape = replace(scenario.shape, keep_prefix=False, num_blocks=24)
        alone = replace(scenario, shape=shape, requests=scenario.requests[:1], profile=ChaosProfile())
        monkeypatch.setattr("penstock.testing.sim_network.SimNetwork.move", _no_copy)
        num_given += run_scenario(alone).faults["given block"]
    assert num_given > 0


def _no_copy(*args: Any) -> None:
    raise AssertionError(f"a block is copied: {args}")


def settles_nothing(self: Ownership, live: Iterable[int] | None = None) -> Settled:
    return Settled()


def settle_anything(self: Ownership, live: Iterable[int] | None = None) -> Settled:
    return original_settle(self, ())


def keeps_what_it_gives(self: Ownership, candidates: Any, peer: str, generation: int) -> set[BlockId]:
    original_hand_over(self, candidates, peer, generation)
    return set()


def pays_nothing_back(self: Ownership, block_ids: Any, granted: Any, giver: int, generation: int) -> list[BlockId]:
    taken = self._checked(block_ids, giver, generation)
    self._pool.adopt_held(taken)
    return taken


def gives_the_first_twice(self: Ownership, block_ids: Any, to: int, generation: int) -> None:
    original_give(self, block_ids, to, generation)
    self._pool.adopt(block_ids[:1])


original_settle, original_hand_over, original_give = Ownership.settle, Ownership.hand_over, Ownership.give


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("settle", settles_nothing),
        ("settle", settle_anything),
        ("hand_over", keeps_what_it_gives),
        ("take", pays_nothing_back),
        ("give", gives_the_first_twice),
    ],
)
def test_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, bug: Any) -> None:
    monkeypatch.setattr(Ownership, name, bug)
    with pytest.raises(InvariantBroken, match=r"^I\d+ "):
        run(range(1, 60))
