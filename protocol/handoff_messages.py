"""What two workers say to each other on a hand-off link."""

from __future__ import annotations

from typing import Annotated

import msgspec

from .parts import (
    NO_PROOF,
    Code,
    Count,
    Digests,
    Epoch,
    Fingerprint,
    Mac,
    Message,
    Ordinals,
    Phases,
    SampledToken,
    Sequence64,
    Text,
    TicketId,
    WorkerId,
)
from .sampling import MAX_CHOICES


class KvHello(Message, frozen=True):
    """First message on a link, both ways. Any mismatch is answered by KvRefuse before a byte moves."""

    worker_id: WorkerId
    epoch: Epoch
    peer_epoch: Epoch | None  # the epoch the caller expects to meet; None from the listener
    fingerprint: Fingerprint
    transports: Annotated[list[Code], msgspec.Meta(max_length=16)]  # from the listener: the one chosen
    host_id: Text
    num_blocks: Count
    block_bytes: Sequence64
    nonce: Mac  # fresh for each connection; the link's session is derived from both
    staging_bytes: Sequence64 = 0
    # allowed, the preferred one first
    wire_dtypes: Annotated[list[Code], msgspec.Meta(max_length=16)] = msgspec.field(default_factory=list)
    digests: bool = True
    has_tls: bool = False
    offers: Annotated[dict[Code, Annotated[bytes, msgspec.Meta(max_length=32 << 10)]], msgspec.Meta(max_length=16)] = (
        msgspec.field(default_factory=dict)
    )  # what each transport wants the peer to know
    token: Annotated[bytes, msgspec.Meta(max_length=32)] = b""  # pairs a second, data connection with this link


class KvProof(Message, frozen=True):
    """Shows knowledge of the cluster's key: a MAC over both hellos. Every later frame carries one of its own."""

    mac: Mac


class KvReady(Message, frozen=True):
    """The end of the handshake, both ways. The dialer has measured the link and says what travels on it."""

    wire_dtype: Code = ""  # empty: blocks as they are


class KvRefuse(Message, frozen=True):
    reason: Text


class Offer(Message, frozen=True):
    """prefill → decode: the KV of this ticket is about to arrive.

    `num_blocks` blocks of `block_size` cover `num_tokens`; those below `reached` are computed or being computed.
    """

    ticket: TicketId
    num_tokens: Count
    num_blocks: Count
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    reached: Count
    proof: Mac = NO_PROOF


class Reached(Message, frozen=True):
    """prefill → decode: blocks below `reached` are computed or being computed."""

    ticket: TicketId
    reached: Count


class Grant(Message, frozen=True):
    """decode → prefill: you may write ordinals [held, stop). The first `held` are here already and must not travel.

    A later grant of the same generation only moves `stop`.
    """

    ticket: TicketId
    generation: Count
    held: Count
    stop: Count


class Push(Message, frozen=True):
    """prefill → decode: these blocks, layers [first_layer, first_layer + num_layers), a digest for each block.

    `source_slots` index the pusher's pool, one for each ordinal. When bytes are converted on the way they lie at
    `staged` in the pusher's staging memory instead.
    """

    ticket: TicketId
    generation: Count
    first_layer: Count
    num_layers: Count
    ordinals: Ordinals
    digests: Digests
    source_slots: Ordinals = msgspec.field(default_factory=list)
    staged: Sequence64 | None = None


class Taken(Message, frozen=True):
    """decode → prefill: the staging memory of the oldest push that was converted is free again."""


class Measure(Message, frozen=True):
    """dialer → listener, within the handshake: send so many bytes of your staging memory, for the link's figures."""

    nbytes: Count


class Done(Message, frozen=True):
    """prefill → decode: all is computed and pushed. `num_blocks` counts the blocks after the held ones.

    `digests` has one for each of them, over the digests of all its pushes: what was verified is what was meant.
    """

    ticket: TicketId
    generation: Count
    num_blocks: Count
    num_tokens: Count
    first_tokens: Annotated[tuple[SampledToken, ...], msgspec.Meta(max_length=MAX_CHOICES)]
    phases: Phases
    digests: Digests = b""


class Failed(Message, frozen=True):
    """prefill → decode: this hand-off will not complete."""

    ticket: TicketId
    code: Code
    message: Text


class Ack(Message, frozen=True):
    """decode → prefill: every block is here and verified; the source may free its blocks."""

    ticket: TicketId
    generation: Count


class Cancel(Message, frozen=True):
    """decode → prefill: this hand-off is not wanted any more (abort, refusal, failure, lease end)."""

    ticket: TicketId
    code: Code
    message: Text


class Renew(Message, frozen=True):
    """Both ways, from the link's own thread: these tickets are alive on my side."""

    tickets: Annotated[list[TicketId], msgspec.Meta(max_length=65536)]


class KvPing(Message, frozen=True):
    """Both ways, from the link's own thread: the process lives."""


HandoffMessage = (
    KvHello
    | KvProof
    | KvReady
    | KvRefuse
    | Offer
    | Reached
    | Grant
    | Push
    | Taken
    | Measure
    | Done
    | Failed
    | Ack
    | Cancel
    | Renew
    | KvPing
)
