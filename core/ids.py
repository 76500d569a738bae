"""Names of things, and where they come from.

A worker is known by `WorkerKey` = (worker_id, epoch): the same name with a new epoch is a new worker, and nothing
that belonged to the old one belongs to it. Ids come from an `IdSource`, so a simulation can replay them.
"""

from __future__ import annotations

import random
import secrets
from typing import NamedTuple, NewType, Protocol

BlockId = NewType("BlockId", int)
MAIN_ROUTER = "router"  # the router that a cluster starts with; others on the same workers have names of their own
Ticket = NewType("Ticket", bytes)  # 16 bytes, single use, names one hand-off of one attempt


class WorkerKey(NamedTuple):
    """One incarnation of one worker."""

    worker_id: str
    epoch: str

    def __str__(self) -> str:
        return f"{self.worker_id}@{self.epoch[:6]}"


class AttemptKey(NamedTuple):
    """One try at one request. A retry has the same request_id and the next attempt number.

    `router`: on a worker, the name of the router that asked for it, whose ids may be those of another one too. A router
    only speaks of its own.
    """

    request_id: str
    attempt: int
    router: str = MAIN_ROUTER

    def __str__(self) -> str:
        whose = "" if self.router == MAIN_ROUTER else f"@{self.router}"
        return f"{self.request_id}#{self.attempt}{whose}"


class IdSource(Protocol):
    def token(self, num_bytes: int) -> bytes: ...


class SecureIds:
    """Ids nobody can guess: the operating system's randomness."""

    def token(self, num_bytes: int) -> bytes:
        return secrets.token_bytes(num_bytes)


class SeededIds:
    """Ids that a seed replays, for tests and simulation."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def token(self, num_bytes: int) -> bytes:
        return self._random.randbytes(num_bytes)


def new_epoch(ids: IdSource) -> str:
    return ids.token(8).hex()


def new_ticket(ids: IdSource) -> Ticket:
    return Ticket(ids.token(16))
