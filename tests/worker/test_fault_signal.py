from __future__ import annotations

import os
import signal
import threading

import pytest

from penstock.core.ids import AttemptKey, BlockId
from penstock.engine.interface import Engine, ScheduledSeq
from penstock.engine.sequence import Sequence
from penstock.kvtransfer.link import Mesh
from penstock.protocol.sampling import SamplingParams
from penstock.testing.fake_engine import FakeEngine
from penstock.worker.core import WorkerCore
from penstock.worker.fault_signal import DIE_VERIFYING, DROP_LINKS, ENABLED, MortalEngine, obey_fault_signals


class Core:
    """Only has an engine."""

    def __init__(self) -> None:
        self.engine: Engine = FakeEngine()


class DroppedMesh:
    """Only notes that its links were dropped."""

    def __init__(self) -> None:
        self.dropped = threading.Event()

    def drop_links(self) -> None:
        self.dropped.set()


def obey(mesh: DroppedMesh, environment: dict[str, str]) -> bool:
    typed: Mesh = mesh  # type: ignore[assignment]  # the one method that is asked for
    core: WorkerCore = Core()  # type: ignore[assignment]  # the one attribute that is asked for
    return obey_fault_signals(typed, core, environment)


@pytest.mark.parametrize("environment", [{}, {ENABLED: "0"}, {ENABLED: "yes"}])
def test_without_the_switch_nothing_listens(environment: dict[str, str]) -> None:
    before = signal.getsignal(DROP_LINKS)
    assert not obey(DroppedMesh(), environment)
    assert signal.getsignal(DROP_LINKS) is before


def test_with_the_switch_the_signal_drops_the_links() -> None:
    mesh, before = DroppedMesh(), [signal.getsignal(number) for number in (DROP_LINKS, DIE_VERIFYING)]
    try:
        assert obey(mesh, {ENABLED: "1"})
        os.kill(os.getpid(), DROP_LINKS)
        assert mesh.dropped.wait(30)
    finally:
        for number, handler in zip((DROP_LINKS, DIE_VERIFYING), before, strict=True):
            signal.signal(number, handler)


def test_a_doomed_engine_dies_in_the_first_step_with_drafts() -> None:
    died: list[int] = []
    engine = MortalEngine(FakeEngine(), lambda: died.append(1))
    seq = Sequence(
        AttemptKey("r", 0),
        0,
        [1, 2, 3],
        SamplingParams(max_tokens=9),
        b"",
        0.0,
        9.0,
        block_table=[BlockId(1), BlockId(2)],
    )
    plain, drafted = ScheduledSeq(seq, 3), ScheduledSeq(seq, 3, (7, 8))
    engine.execute([plain])
    engine.execute([drafted])
    engine.doom()
    engine.execute([plain])
    assert not died
    assert engine.execute([plain, drafted])
    assert died
