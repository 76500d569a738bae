"""What the hand-off state machines ask for (effects), and what a link tells them (events).

The machines in `source.py` and `destination.py` touch no socket and no byte: they return effects, the worker carries
them out on the link to the peer, and what happens there comes back as events.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """Source: digest these blocks, send the Push and make the bytes reach the peer. Order with SendMessage is kept."""

    peer: WorkerKey
    ticket: Ticket
    generation: int
    ordinals: tuple[int, ...]
    block_ids: tuple[BlockId, ...]  # one for each ordinal


@dataclass(frozen=True, slots=True)
class AcceptBlocks:
    """Destination: from now on ordinals of this ticket may be written into these blocks, and nowhere else."""

    peer: WorkerKey
    ticket: Ticket
    generation: int
    blocks: dict[int, BlockId]  # ordinal → block


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
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Received:
    """Every block is here and verified. The blocks are the role's."""

    ticket: Ticket
    done: Done


@dataclass(frozen=True, slots=True)
class ReceiveFailed:
    """This hand-off will not complete, exactly once. Granted blocks are the role's again: no write can follow."""

    ticket: Ticket
    code: str
    message: str


LinkEffect = SendMessage | SendBlocks | AcceptBlocks | Revoke
SourceEffect = SendMessage | SendBlocks | SourceEnded
DestinationEffect = SendMessage | AcceptBlocks | Revoke | Offered | Received | ReceiveFailed

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
    """Destination: these ordinals (all layers) are in their blocks, or `corrupt` ones did not match their digest."""

    peer: WorkerKey
    ticket: Ticket
    generation: int
    ordinals: tuple[int, ...]
    corrupt: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Revoked:
    peer: WorkerKey
    ticket: Ticket


LinkEvent = PeerUp | PeerLost | MessageArrived | BlocksArrived | Revoked
