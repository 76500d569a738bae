"""One hand-off at its destination: what has been offered, granted, and has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ..core.ids import BlockId, WorkerKey
from ..protocol.messages import NO_PROOF, Done, Offer


class State(Enum):
    EXPECTED = "expected"  # the role waits for an offer
    OFFERED = "offered"  # the role may grant
    GRANTED = "granted"  # blocks may be written
    REVOKING = "revoking"  # failed; a write may still happen


@dataclass(frozen=True, slots=True)
class Granting:
    """Ordinals [held, stop) of the source's blocks may be written into `table`, the sequence's blocks up to there.

    Its first `num_held` blocks, which hold the first `held` of the source's, are here already and may be shared.
    """

    held: int
    stop: int
    num_held: int
    table: tuple[BlockId, ...]


@dataclass(slots=True)
class Incoming:
    """One live hand-off. `digests`: ordinals that have come, and what was verified; `failure` is set while revoking."""

    peer: WorkerKey
    state: State
    deadline: float
    proof: bytes = NO_PROOF
    offer: Offer | None = None
    reached: int = 0
    generation: int = 0
    granted: Granting | None = None
    digests: dict[int, bytes] = field(default_factory=dict)
    given: dict[int, BlockId] = field(default_factory=dict)  # ordinal → the source's block that holds it
    said_at: float = 0.0  # the last grant, or the last block after it
    done: Done | None = None
    failure: tuple[str, str] = ("", "")

    @property
    def num_blocks(self) -> int:
        return self.offer.num_blocks if self.offer is not None else 0

    @property
    def own_blocks(self) -> tuple[BlockId, ...]:
        return self.granted.table[self.granted.num_held :] if self.granted is not None else ()

    @property
    def has_everything(self) -> bool:
        granted = self.granted
        return granted is not None and granted.held + len(self.digests) == self.num_blocks

    @property
    def is_unheard(self) -> bool:
        """Granted ordinals have not come, or only Done is missing: perhaps the source has not heard the grant."""
        granted = self.granted
        if self.state is not State.GRANTED or granted is None:
            return False
        return granted.held + len(self.digests) < granted.stop or self.has_everything
