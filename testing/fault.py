"""What a fault of the fault matrix is, and what it may strike.

A `Fault` is made at the moment, `strike`s once, and is asked at the end to `verify`: it looks at processes, frames and
times as they were observed, not at what `strike` meant to do. `verify` says why the fault did not happen, or nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum

from .fault_cluster import FaultCluster
from .tap import ROUTER

SLACK_S = 0.05  # between what was meant and what is measured


class Target(Enum):
    """What is struck."""

    ROUTER = "router"
    PREFILL = "P"
    DECODE = "D"
    TRANSFER = "P↔D"
    BLOCKS = "P→D blocks"
    TO_PREFILL = "router↔P"
    TO_DECODE = "router↔D"
    FORWARD = "clock +60 s"
    BACK = "clock −60 s"


PROCESSES = (Target.PREFILL, Target.DECODE, Target.ROUTER)
WORKERS = (Target.PREFILL, Target.DECODE)
LINKS = (Target.TRANSFER, Target.TO_PREFILL, Target.TO_DECODE)


@dataclass(frozen=True, slots=True)
class Aim:
    """Where a fault goes: the workers of the victim, and which part of it all."""

    target: Target
    prefill: str
    decode: str

    @property
    def process(self) -> str:
        names = {Target.PREFILL: self.prefill, Target.DECODE: self.decode, Target.ROUTER: ROUTER.worker_id}
        return names[self.target]

    @property
    def ends(self) -> tuple[str, str]:
        router = ROUTER.worker_id
        if self.target is Target.TO_PREFILL:
            return router, self.prefill
        return (router, self.decode) if self.target is Target.TO_DECODE else (self.prefill, self.decode)


class Fault:
    """Base of all: what there is when the moment has come."""

    def __init__(self, cluster: FaultCluster, aim: Aim, rng: random.Random) -> None:
        self.cluster, self.aim, self.rng = cluster, aim, rng
        self.tap, self.since = cluster.fault_tap, cluster.clock.now()

    def strike(self) -> None:
        """Do it."""

    @property
    def lasts_s(self) -> float:
        """How long it goes on, from the moment on."""
        return 0.0

    @property
    def is_pending(self) -> bool:
        """It waits for traffic to happen to."""
        return False

    def verify(self) -> str:
        """Why it did not happen; empty when it did."""
        return "nothing was done"

    def close(self) -> None:
        """Undo what outlives the cluster."""
