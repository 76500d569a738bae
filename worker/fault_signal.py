"""Switches for tests of the whole system: a running worker does to itself what nothing outside can do, when it is told.

Killing and freezing a process needs no help from it. Losing a network does, where the links are Unix sockets; and so
does dying within a step that verifies drafts. Nothing listens unless PENSTOCK_TEST_HOOKS=1 is in the environment.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping

from ..engine.interface import Engine, OnLayers, ScheduledSeq
from ..kvtransfer.link import Mesh
from ..protocol.messages import SampledToken
from .core import WorkerCore

ENABLED = "PENSTOCK_TEST_HOOKS"
DROP_LINKS, DIE_VERIFYING = signal.SIGUSR2, signal.SIGUSR1
DYING = "dies in a step that verifies"

log = logging.getLogger(__name__)


def obey_fault_signals(mesh: Mesh, core: WorkerCore, environment: Mapping[str, str]) -> bool:
    """If the environment asks for it: break every link of `mesh` at each DROP_LINKS, and die at DIE_VERIFYING within
    the next step of `core` that verifies drafts. Whether the environment does. Main thread only.
    """
    if environment.get(ENABLED) != "1":
        return False
    mortal = MortalEngine(core.engine, lambda: os.kill(os.getpid(), signal.SIGKILL))
    core.engine = mortal
    log.warning(
        "%s=1: this worker drops its hand-off links at %s and dies at %s", ENABLED, DROP_LINKS.name, DIE_VERIFYING.name
    )
    # On a thread of its own: the loop may hold the mesh's lock just now, or compute for a while.
    signal.signal(DROP_LINKS, lambda *_: threading.Thread(target=mesh.drop_links, name="drop-links").start())
    signal.signal(DIE_VERIFYING, lambda *_: mortal.doom())
    return True


class MortalEngine:
    """`inner`, which once it is doomed dies when a step with drafts is computed and nobody knows of its tokens."""

    def __init__(self, inner: Engine, die: Callable[[], None]) -> None:
        self.inner, self.spec, self.memory = inner, inner.spec, inner.memory
        self._die, self._is_doomed = die, False

    def doom(self) -> None:
        self._is_doomed = True

    def execute(self, batch: list[ScheduledSeq], on_layers: OnLayers | None = None) -> list[tuple[SampledToken, ...]]:
        """See `Engine.execute`."""
        drawn = self.inner.execute(batch, on_layers)
        drafted = sum(len(entry.draft) for entry in batch)
        if self._is_doomed and drafted:
            kept = sum(len(tokens) - 1 for entry, tokens in zip(batch, drawn, strict=True) if entry.draft)
            log.warning("%s %d drafted tokens, %d of them right, of %d sequences", DYING, drafted, kept, len(batch))
            self._die()
        return drawn

    def rest(self) -> None:
        self.inner.rest()
