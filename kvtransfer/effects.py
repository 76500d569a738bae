"""What the hand-off state machines ask for (effects), and what a link tells them (events).

The machines in `source.py` and `destination.py` touch no socket and no byte: they return effects, the worker carries
them out on the link to the peer, and what happens there comes back as events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.ids import BlockId, Ticket, WorkerKey
from ..protocol.messages import Done, HandoffMessage

# ---- effects on a link ----


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Put `message` on the control connection to `peer`."""

    peer: WorkerKey
    message: HandoffMessage


@dataclass(frozen=True, slots=True)
class SendBlocks:
    """Source: digest these blocks, send the Push and make the bytes reach the peer. Order with Done is kept."""

    peer: WorkerKey
    ticket: Ticket
    generation: int
    ordinals: tuple[int, ...]
    block_ids: tuple[BlockId, ...]  # one for each ordinal
    first_layer: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Source: this ticket is over. What waits for it is dropped; a push whose digests are not sent yet never leaves."""

    peer: WorkerKey
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Renewing:
    """Both: from now on (or no more) the link's own thread tells the peer that this ticket is alive here."""

    peer: WorkerKey
    ticket: Ticket
    is_alive: bool


@dataclass(frozen=True, slots=True)
class AcceptBlocks:
    """Destination: from now on ordinals [first, stop) may be written too, into the blocks of `table` and nowhere else.

    `table` is the sequence's own: block t // block_size holds token t. Blocks before the first one granted are shared.
    """

    peer: WorkerKey
    ticket: Ticket
    generation: int
    first: int
    stop: int
    table: tuple[BlockId, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Revoke:
    """Destination: write nothing more for this ticket. Answered by the event `Revoked` once no write can follow."""

    peer: WorkerKey
    ticket: Ticket


# ---- effects for the role that owns the sequence ----


@dataclass(frozen=True, slots=True)
class SourceEnded:
    """The source side of this ticket is over, exactly once:

    its blocks are the role's again. `code` is empty when acknowledged.
    """

    ticket: Ticket
    code: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Offered:
    """A source is about to push: the role may `grant` now or later, in any order, until the ticket ends."""

    ticket: Ticket
    num_tokens: int
    num_blocks: int  # of the source, of its `block_size`
    block_size: int
    reached: int  # blocks below are about to come


@dataclass(frozen=True, slots=True)
class Advanced:
    """The source has come further: the role may grant up to here."""

    ticket: Ticket
    reached: int


@dataclass(frozen=True, slots=True)
class Received:
    """Every block is here and verified. The blocks are the role's.

    `given`: ordinal → block of the source, given under Done's generation, that holds it in place of the granted one.
    """

    ticket: Ticket
    done: Done
    given: Mapping[int, BlockId] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReceiveFailed:
    """This hand-off will not complete, exactly once. Granted blocks are the role's again: no write can follow."""

    ticket: Ticket
    code: str
    message: str


LinkEffect = SendMessage | SendBlocks | Withdraw | Renewing | AcceptBlocks | Revoke
SourceEffect = SendMessage | SendBlocks | Withdraw | Renewing | SourceEnded
DestinationEffect = SendMessage | Renewing | AcceptBlocks | Revoke | Offered | Advanced | Received | ReceiveFailed

# ---- events from a link ----


@dataclass(frozen=True, slots=True)
class PeerUp:
    peer: WorkerKey
    transport: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The control connection ended or fell silent.

    Every hand-off with this incarnation is over; no write from it can follow.
    """

    peer: WorkerKey
    reason: str


@dataclass(frozen=True, slots=True)
class MessageArrived:
    peer: WorkerKey
    message: HandoffMessage


@dataclass(frozen=True, slots=True)
class BlocksArrived:
    """Destination: these ordinals (all layers) are in their blocks, or `corrupt` ones did not match their digest.

    `digests`: for each of `ordinals` what Done must say of it. `given`: (ordinal, block) where a block of the source,
    which it has given to this worker, holds the ordinal in place of the granted one.
    """

    peer: WorkerKey
    ticket: Ticket
    generation: int
    ordinals: tuple[int, ...]
    corrupt: tuple[int, ...] = ()
    digests: tuple[bytes, ...] = ()
    given: tuple[tuple[int, BlockId], ...] = ()


@dataclass(frozen=True, slots=True)
class Revoked:
    peer: WorkerKey
    ticket: Ticket


LinkEvent = PeerUp | PeerLost | MessageArrived | BlocksArrived | Revoked
