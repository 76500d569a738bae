"""A switch for tests of the whole system: a running worker breaks its hand-off links when it is told to.

Killing and freezing a process needs no help from it; losing a network does, where the links are Unix sockets. Nothing
listens unless PENSTOCK_TEST_HOOKS=1 is in the environment.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping

from ..kvtransfer.link import Mesh

ENABLED = "PENSTOCK_TEST_HOOKS"
DROP_LINKS = signal.SIGUSR2

log = logging.getLogger(__name__)


def obey_fault_signals(mesh: Mesh, environment: Mapping[str, str]) -> bool:
    """Break every link of `mesh` at each DROP_LINKS, if the environment asks for it; whether it does. Main thread
    only.
    """
    if environment.get(ENABLED) != "1":
        return False
    log.warning("%s=1: this worker drops its hand-off links at %s", ENABLED, DROP_LINKS.name)
    # On a thread of its own: the loop may hold the mesh's lock just now, or compute for a while.
    signal.signal(DROP_LINKS, lambda *_: threading.Thread(target=mesh.drop_links, name="drop-links").start())
    return True
