"""A way that is never taken is tried now and then, and what that costs stays within its share."""

from __future__ import annotations

import pytest

from penstock.router.probing import MAX_PATIENCE, PATIENCE, SHARE, Probing


def run(probing: Probing, count: int, *, local_s: float, remote_s: float) -> list[bool]:
    best = remote_s < local_s
    return [probing.decide(best, min(local_s, remote_s), max(local_s, remote_s)) for _ in range(count)]


@pytest.mark.parametrize(("local_s", "remote_s"), [(1.0, 1.1), (1.1, 1.0)])
def test_the_other_way_is_tried_after_a_while_and_then_ever_more_rarely(local_s: float, remote_s: float) -> None:
    best = remote_s < local_s
    taken = run(Probing(), 8 * PATIENCE, local_s=local_s, remote_s=remote_s)
    tries = [place for place, way in enumerate(taken) if way is not best]
    assert tries == [PATIENCE, 3 * PATIENCE + 1, 7 * PATIENCE + 2]


def test_a_try_waits_until_it_can_be_afforded_and_all_stay_within_their_share() -> None:
    count = 20_000
    taken = run(Probing(), count, local_s=1.0, remote_s=5.0)
    tries = [place for place, way in enumerate(taken) if way]
    assert tries[0] == 4.0 / SHARE
    assert 0 < 4.0 * len(tries) <= SHARE * count
    assert len(tries) <= count / MAX_PATIENCE + 8


def test_ways_that_are_both_taken_are_not_tried() -> None:
    probing = Probing()
    for place in range(1000):
        best = place % 3 == 0
        assert probing.decide(best, 1.0, 1.1) is best
    assert probing.num_probes == 0


def test_a_way_that_has_become_the_better_one_is_tried_soon_again_when_it_no_longer_is() -> None:
    probing = Probing()
    run(probing, 100 * PATIENCE, local_s=1.0, remote_s=1.1)
    run(probing, 10, local_s=1.1, remote_s=1.0)
    taken = run(probing, 2 * PATIENCE, local_s=1.0, remote_s=1.1)
    assert taken.index(True) == PATIENCE
