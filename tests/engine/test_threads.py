"""Thread settings, and the share of the cores a worker takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.ids import AttemptKey, BlockId
from penstock.engine.core_share import GRACE_S, STEP_S, CoreShare, SharingEngine
from penstock.engine.interface import ScheduledSeq
from penstock.engine.sequence import Sequence
from penstock.engine.threads import thread_environment
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine


def test_environment_threads_stop_spinning_by_themselves() -> None:
    environment = thread_environment(4)
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "4"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert 0 < int(environment["GOMP_SPINCOUNT"]) <= 1_000_000


def shares(path: Path, clock: FakeClock, count: int, max_threads: int = 8) -> list[CoreShare]:
    return [CoreShare(path / "cores", slot, max_threads, clock) for slot in range(count)]


def test_share_alone_takes_every_thread_and_with_others_its_part(tmp_path: Path) -> None:
    one, two, three = shares(tmp_path, FakeClock(), 3)
    assert one.begin() == 8
    assert two.begin() == 4
    assert three.begin() == 2
    assert one.num_threads() == 2


def test_share_of_a_worker_that_pauses_returns_to_the_others(tmp_path: Path) -> None:
    clock = FakeClock()
    one, two = shares(tmp_path, clock, 2)
    one.begin()
    one.end()
    assert two.begin() == 4, "the next step of the other usually follows at once"
    clock.advance(GRACE_S)
    assert two.begin() == 8


def test_share_of_a_worker_that_rests_returns_at_once(tmp_path: Path) -> None:
    one, two = shares(tmp_path, FakeClock(), 2)
    one.begin()
    one.end()
    one.rest()
    assert two.begin() == 8


def test_share_of_a_worker_killed_in_a_step_returns_to_the_others(tmp_path: Path) -> None:
    clock = FakeClock()
    one, two = shares(tmp_path, clock, 2)
    one.begin()
    clock.advance(STEP_S)
    assert two.begin() == 8


def test_share_is_never_less_than_one_thread(tmp_path: Path) -> None:
    found = [share.begin() for share in shares(tmp_path, FakeClock(), 5, max_threads=2)]
    assert found == [2, 1, 1, 1, 1]


def test_share_slot_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slot 256"):
        CoreShare(tmp_path / "cores", 256, 2, FakeClock())


def test_sharing_engine_sets_threads_only_when_they_change(tmp_path: Path) -> None:
    clock = FakeClock()
    one, two = shares(tmp_path, clock, 2)
    asked: list[int] = []
    engine = SharingEngine(FakeEngine(), one, asked.append)
    prompt = list(range(1, 101))
    seq = Sequence(
        AttemptKey("r", 1),
        0,
        prompt,
        SamplingParams(),
        b"k" * 32,
        0.0,
        1e9,
        block_table=[BlockId(i) for i in range(25)],
    )
    engine.execute([ScheduledSeq(seq, 60)])
    engine.execute([ScheduledSeq(seq, 60)])
    two.begin()
    engine.execute([ScheduledSeq(seq, 60)])
    assert asked == [8, 4], "a step of many tokens takes the whole share"
    engine.execute([ScheduledSeq(seq, 1)])
    assert asked == [8, 4, 2], "a step of few tokens takes half of it"
    engine.rest()
    assert two.num_threads() == 8
