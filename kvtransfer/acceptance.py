"""Where a link may write: the blocks granted, and what of them is still to come. Shared by all transports.

The worker's thread accepts and revokes, the thread that writes blocks claims and finishes. A ticket whose last ordinal
has arrived is forgotten, so nothing is written for it afterwards; a generation that is not the accepted one is refused.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ..core.errors import ProtocolError
from ..core.ids import BlockId, Ticket
from ..protocol.messages import Push


@dataclass(slots=True)
class _Accepted:
    """`missing`: ordinal → bit mask of the layers that have not come."""

    generation: int
    blocks: dict[int, BlockId]
    missing: dict[int, int]
    writing: bool = False
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished push means. With `revoked` only that is to be reported."""

    arrived: tuple[int, ...] = ()
    revoked: bool = False


class Acceptances:
    """The accepted tickets of one link. `refused` counts pushes that fit no open ticket, generation or ordinal."""

    def __init__(self, num_layers: int) -> None:
        self._all_layers = (1 << num_layers) - 1
        self._accepted: dict[Ticket, _Accepted] = {}
        self._lock = threading.Lock()
        self.refused = 0

    def __len__(self) -> int:
        return len(self._accepted)

    def accept(self, ticket: Ticket, generation: int, blocks: dict[int, BlockId]) -> None:
        with self._lock:
            if blocks:
                self._accepted[ticket] = _Accepted(generation, dict(blocks), dict.fromkeys(blocks, self._all_layers))

    def revoke(self, ticket: Ticket) -> bool:
        """Allow no further claim. True when nothing is being written; else the writer reports it with its outcome."""
        with self._lock:
            accepted = self._accepted.get(ticket)
            if accepted is not None and accepted.writing:
                accepted.revoked = True
                return False
            self._accepted.pop(ticket, None)
            return True

    def claim(self, push: Push) -> list[BlockId] | None:
        """The block for each ordinal of `push`, now being written; None when any of it is not open for writing."""
        layers = layer_mask(push)
        with self._lock:
            accepted = self._accepted.get(Ticket(push.ticket))
            if accepted is None or accepted.writing or accepted.generation != push.generation:
                self.refused += 1
                return None
            if any(accepted.missing.get(ordinal, 0) & layers != layers for ordinal in push.ordinals):
                self.refused += 1
                return None
            accepted.writing = True
            return [accepted.blocks[ordinal] for ordinal in push.ordinals]

    def is_revoked(self, push: Push) -> bool:
        """Ask between two writes of a claimed push."""
        return self._accepted[Ticket(push.ticket)].revoked

    def finish(self, push: Push) -> Outcome:
        """The writer is out of these blocks. Exactly once for each claim."""
        layers, ticket = layer_mask(push), Ticket(push.ticket)
        with self._lock:
            accepted = self._accepted[ticket]
            accepted.writing = False
            if accepted.revoked:
                del self._accepted[ticket]
                return Outcome(revoked=True)
            for ordinal in push.ordinals:
                accepted.missing[ordinal] &= ~layers
            arrived = tuple(ordinal for ordinal in push.ordinals if not accepted.missing[ordinal])
            for ordinal in arrived:
                del accepted.missing[ordinal]
            if not accepted.missing:
                del self._accepted[ticket]
            return Outcome(arrived)


def layer_mask(push: Push) -> int:
    return ((1 << push.num_layers) - 1) << push.first_layer


def check_push(push: Push, num_blocks: int, num_layers: int) -> None:
    """Raise ProtocolError for a push that no honest peer sends to a pool of this shape."""
    count = len(push.ordinals)
    if not 0 < count <= num_blocks or len(set(push.ordinals)) != count or len(push.digests) != count:
        raise ProtocolError(
            f"push of {count} ordinals with {len(push.digests)} digests into a pool of {num_blocks} blocks"
        )
    if push.num_layers < 1 or push.first_layer + push.num_layers > num_layers:
        stop = push.first_layer + push.num_layers
        raise ProtocolError(f"push of layers [{push.first_layer}, {stop}); the model has {num_layers}")


def check_source_slots(push: Push, num_source_blocks: int) -> None:
    """Raise ProtocolError unless every slot lies in the pusher's pool."""
    if len(push.source_slots) != len(push.ordinals) or max(push.source_slots) >= num_source_blocks:
        found = f"{len(push.source_slots)} source slots for {len(push.ordinals)} ordinals"
        raise ProtocolError(f"push with {found}; every slot must be below {num_source_blocks}")
