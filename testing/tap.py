"""A place to look at, hold back, change or repeat every frame of a simulated cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.ids import WorkerKey
from ..protocol.messages import HandoffMessage, Push, ToRouter, ToWorker

ROUTER = WorkerKey("router", "")


@dataclass(frozen=True, slots=True, eq=False)
class Crossing:
    """One frame on its way, at the moment when its sender let go of it."""

    source: WorkerKey
    target: WorkerKey
    message: ToWorker | ToRouter | HandoffMessage
    left_at: float

    @property
    def link(self) -> frozenset[str]:
        """The names of both ends."""
        return frozenset((self.source.worker_id, self.target.worker_id))


class Tap:
    """Lets everything pass; a subclass does not.

    `carry` and `deliver` take the bytes and may be called once, never, twice, or later.
    """

    def leaves(self, crossing: Crossing, frame: bytes, carry: Callable[[bytes], None]) -> None:
        carry(frame)

    def arrives(self, crossing: Crossing, frame: bytes, deliver: Callable[[bytes], None]) -> None:
        deliver(frame)

    def copied(self, push: Push, source: WorkerKey, target: WorkerKey, view: memoryview) -> None:
        """The bytes of one block have just been written to `view`, and are checked next."""
