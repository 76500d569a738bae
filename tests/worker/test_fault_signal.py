from __future__ import annotations

import os
import signal
import threading

import pytest

from penstock.kvtransfer.link import Mesh
from penstock.worker.fault_signal import DROP_LINKS, ENABLED, obey_fault_signals


class DroppedMesh:
    """Only notes that its links were dropped."""

    def __init__(self) -> None:
        self.dropped = threading.Event()

    def drop_links(self) -> None:
        self.dropped.set()


def obey(mesh: DroppedMesh, environment: dict[str, str]) -> bool:
    typed: Mesh = mesh  # type: ignore[assignment]  # the one method that is asked for
    return obey_fault_signals(typed, environment)


@pytest.mark.parametrize("environment", [{}, {ENABLED: "0"}, {ENABLED: "yes"}])
def test_without_the_switch_nothing_listens(environment: dict[str, str]) -> None:
    before = signal.getsignal(DROP_LINKS)
    assert not obey(DroppedMesh(), environment)
    assert signal.getsignal(DROP_LINKS) is before


def test_with_the_switch_the_signal_drops_the_links() -> None:
    mesh, before = DroppedMesh(), signal.getsignal(DROP_LINKS)
    try:
        assert obey(mesh, {ENABLED: "1"})
        os.kill(os.getpid(), DROP_LINKS)
        assert mesh.dropped.wait(30)
    finally:
        signal.signal(DROP_LINKS, before)
