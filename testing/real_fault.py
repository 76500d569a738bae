"""What a fault of the fault matrix is where processes are real."""

from __future__ import annotations

import random
import time

from .fault import Aim
from .real_cluster import RealCluster


class RealFault:
    """Made at the moment; `strike` once; `verify` says at the end why it did not happen, or nothing."""

    def __init__(self, cluster: RealCluster, aim: Aim, rng: random.Random) -> None:
        self.cluster, self.aim, self.rng = cluster, aim, rng
        self.since = time.monotonic()
        self._log_sizes = {name: cluster.log(name).stat().st_size for name in cluster.workers}

    @property
    def lasts_s(self) -> float:
        return 0.0

    def strike(self) -> None:
        """Do it."""

    @property
    def is_pending(self) -> bool:
        """It waits for traffic to happen to."""
        return False

    def verify(self) -> str:
        return "nothing was done"

    def close(self) -> None:
        """Leave nothing behind."""

    def logged(self, *names: str) -> str:
        """What these workers have written since the moment."""
        parts = (self.cluster.log(name).read_bytes()[self._log_sizes[name] :] for name in names)
        return b"".join(parts).decode(errors="replace")
