"""What a worker asks of a role, and what a role may ask for.

A worker hosts the prefill role, the decode role, or both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..core.errors import ServeError
from ..core.ids import MAIN_ROUTER, AttemptKey, BlockId
from ..engine.interface import ScheduledSeq
from ..kvtransfer.effects import LinkEffect, LinkEvent
from ..protocol.messages import SampledToken, ToRouter, ToWorker, WorkerLoad
from .routers import Tallies


@dataclass(frozen=True, slots=True)
class Tell:
    """Send `message` to the router of this name."""

    message: ToRouter
    router: str = MAIN_ROUTER


Effect = Tell | LinkEffect
Computed = tuple[ScheduledSeq, tuple[SampledToken, ...]]


@dataclass(slots=True)
class Budget:
    """What is left of one step: tokens to compute and sequences to run. Roles take from it in turn."""

    num_tokens: int
    num_seqs: int


class Role(Protocol):
    """Pure: each call changes the role's own state and collects effects; nothing blocks, nothing reads a clock."""

    hands_off: bool  # what it computes goes to other workers, perhaps within the step
    max_requests: int  # attempts that it takes at a time; what is beyond is refused

    def on_command(self, message: ToWorker, now: float, router: str = MAIN_ROUTER) -> None:
        """`router`: who asks. Its requests are told apart from those of other routers that have the same ids."""
        ...

    def on_link(self, event: LinkEvent, now: float) -> None: ...

    def schedule(self, budget: Budget, now: float) -> list[ScheduledSeq]:
        """Choose what to compute in the next step, taking from `budget`; its blocks are allocated on return."""
        ...

    def layers_computed(self, entries: list[ScheduledSeq], num_layers: int, now: float) -> None:
        """Within the step: the first `num_layers` layers of these entries are in the cache."""
        ...

    def commit(self, computed: list[Computed], now: float) -> None:
        """The step is done for these entries of `schedule`."""
        ...

    def fail_entry(self, entry: ScheduledSeq, error: ServeError, now: float) -> None:
        """The engine refused this entry of `schedule`; only its request ends."""
        ...

    def tick(self, now: float) -> None:
        """Deadlines and leases."""
        ...

    def abort_all(self, now: float, router: str = MAIN_ROUTER) -> None:
        """The router that asked for this work is gone. What others have asked for goes on."""
        ...

    def take_effects(self) -> list[Effect]:
        """The effects collected since the last call, in order."""
        ...

    def has_work(self) -> bool:
        """Something may be scheduled now, if there is room."""
        ...

    def active(self) -> list[AttemptKey]: ...

    def load(self) -> WorkerLoad:
        """This role's share of the counters; the worker adds the shares and fills in the pool's."""
        ...

    def tally(self, tallies: Tallies) -> None:
        """Add what each router's attempts take in this role."""
        ...

    def owners(self) -> Iterable[list[BlockId]]:
        """The block lists this role holds references for, for the audit."""
        ...
