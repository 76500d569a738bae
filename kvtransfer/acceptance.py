"""Where a link may write: the ordinals granted, and what of them is still to come. Shared by all transports.

The worker's thread accepts and revokes, the thread that writes blocks claims and finishes. What an ordinal's layers
brought is taken once: a generation that is not the accepted one is refused, and so is a layer that is here already.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from ..core.errors import ProtocolError
from ..core.ids import BlockId, Ticket
from ..protocol.messages import Push
from .digest import DIGEST_BYTES, combined_digest
from .effects import AcceptBlocks

Pieces = list[tuple[int, int, bytes]]  # (first layer, number of layers, digest) of each push of one ordinal


@dataclass(slots=True)
class _Accepted:
    """`missing`: ordinal → bit mask of the layers that have not come; `pieces`: what has, for the last word."""

    generation: int
    table: tuple[BlockId, ...]
    num_tokens: int
    missing: dict[int, int] = field(default_factory=dict)
    pieces: dict[int, Pieces] = field(default_factory=dict)
    writing: bool = False
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """Leave to write one push: into the sequence's blocks `table`, which hold its first `num_tokens` tokens."""

    table: tuple[BlockId, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished push means: ordinals with all their layers, and what Done must say of each. With `revoked` only
    that is to be reported.
    """

    arrived: tuple[int, ...] = ()
    digests: tuple[bytes, ...] = ()
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

    def accept(self, effect: AcceptBlocks) -> None:
        """Open ordinals [first, stop) of a ticket, in addition to those before."""
        if effect.first == effect.stop:
            return
        fresh = range(effect.first, effect.stop)
        with self._lock:
            accepted = self._accepted.get(effect.ticket)
            if accepted is None or accepted.generation != effect.generation:
                accepted = _Accepted(effect.generation, effect.table, effect.num_tokens)
                self._accepted[effect.ticket] = accepted
            accepted.table = effect.table
            accepted.missing.update(dict.fromkeys(fresh, self._all_layers))
            accepted.pieces.update({ordinal: [] for ordinal in fresh})

    def revoke(self, ticket: Ticket) -> bool:
        """Allow no further claim. True when nothing is being written; else the writer reports it with its outcome."""
        with self._lock:
            accepted = self._accepted.get(ticket)
            if accepted is not None and accepted.writing:
                accepted.revoked = True
                return False
            self._accepted.pop(ticket, None)
            return True

    def claim(self, push: Push) -> Claim | None:
        """Begin to write `push`; None when any of it is not open for writing."""
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
            return Claim(accepted.table, accepted.num_tokens)

    def is_wanted(self, push: Push) -> bool:
        """Ask between two writes of a claimed push."""
        return not self._accepted[Ticket(push.ticket)].revoked

    def finish(self, push: Push) -> Outcome:
        """The writer is out of these blocks, whose bytes have the digests of the push. Once for each claim."""
        layers, ticket = layer_mask(push), Ticket(push.ticket)
        with self._lock:
            accepted = self._accepted[ticket]
            accepted.writing = False
            if accepted.revoked:
                del self._accepted[ticket]
                return Outcome(revoked=True)
            for at, ordinal in enumerate(push.ordinals):
                accepted.missing[ordinal] &= ~layers
                accepted.pieces[ordinal].append((push.first_layer, push.num_layers, digest_at(push, at)))
            arrived = tuple(ordinal for ordinal in push.ordinals if not accepted.missing[ordinal])
            digests = tuple(combined_digest(accepted.pieces.pop(ordinal)) for ordinal in arrived)
            for ordinal in arrived:
                del accepted.missing[ordinal]
            if not accepted.missing:
                del self._accepted[ticket]
            return Outcome(arrived, digests)


def digest_at(push: Push, index: int) -> bytes:
    """The digest of the push's block number `index`."""
    return push.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]


def layer_mask(push: Push) -> int:
    return ((1 << push.num_layers) - 1) << push.first_layer


def check_push(push: Push, num_source_blocks: int, num_layers: int) -> None:
    """Raise ProtocolError for a push that no honest peer with a pool of this shape sends."""
    count = len(push.ordinals)
    if not 0 < count <= num_source_blocks or len(set(push.ordinals)) != count:
        raise ProtocolError(f"push of {count} ordinals out of a pool of {num_source_blocks} blocks")
    if len(push.digests) != count * DIGEST_BYTES:
        raise ProtocolError(f"push of {count} ordinals with {len(push.digests)} bytes of digests")
    if push.num_layers < 1 or push.first_layer + push.num_layers > num_layers:
        stop = push.first_layer + push.num_layers
        raise ProtocolError(f"push of layers [{push.first_layer}, {stop}); the model has {num_layers}")
    if push.staged is None and (len(push.source_slots) != count or max(push.source_slots) >= num_source_blocks):
        found = f"{len(push.source_slots)} source slots for {count} ordinals"
        raise ProtocolError(f"push with {found}; every slot must be below {num_source_blocks}")
