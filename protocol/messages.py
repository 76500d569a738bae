"""Every message on the wire, as msgspec structs; their encoding is MessagePack.

Families are named after the receiver:

    ToWorker    router → worker        ToRouter    worker → router        HandoffMessage    worker ↔ worker

Every field has a type and a bound, unknown fields are refused, so decoding is validation. Token ids travel as little-
endian int32 bytes (`pack_ids`, `unpack_ids`). No message carries an address or a size that the receiver has not
granted; the one place where a worker names where it listens is `Hello`, and only the router passes that on.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..core.ids import MAIN_ROUTER
from .handoff_messages import (
    Ack,
    Cancel,
    Done,
    Failed,
    Grant,
    HandoffMessage,
    KvHello,
    KvPing,
    KvProof,
    KvReady,
    KvRefuse,
    Measure,
    Offer,
    Push,
    Reached,
    Renew,
    Taken,
)
from .parts import (
    CONVERTIBLE_DTYPES,
    MAX_BLOCKS,
    MAX_PROMPT_BYTES,
    MAX_REQUESTS,
    NO_PROOF,
    PROTOCOL_VERSION,
    ChoiceState,
    Code,
    Count,
    Digests,
    Epoch,
    Fingerprint,
    FinishReason,
    IdBytes,
    Mac,
    Message,
    Ordinals,
    OthersLoad,
    Part,
    Peer,
    Phases,
    RequestId,
    Role,
    SampledToken,
    Seconds,
    Sequence64,
    StepTime,
    Text,
    TicketId,
    TokenLogprob,
    WorkerId,
    WorkerLoad,
    WorkerState,
    check_ids,
    pack_ids,
    unpack_ids,
)
from .sampling import MAX_CHOICES, SamplingParams, TokenId

__all__ = [
    "CONVERTIBLE_DTYPES",
    "MAX_BLOCKS",
    "MAX_PROMPT_BYTES",
    "MAX_REQUESTS",
    "NO_PROOF",
    "PROTOCOL_VERSION",
    "Abort",
    "Ack",
    "AttemptFailed",
    "BlockNews",
    "Cancel",
    "ChoiceState",
    "Code",
    "Count",
    "Digests",
    "Done",
    "Drain",
    "Epoch",
    "Failed",
    "Fingerprint",
    "FinishReason",
    "FromRouter",
    "FromWorker",
    "Goodbye",
    "Grant",
    "HandoffMessage",
    "Heartbeat",
    "Hello",
    "IdBytes",
    "KvHello",
    "KvPing",
    "KvProof",
    "KvReady",
    "KvRefuse",
    "Mac",
    "Measure",
    "Message",
    "Offer",
    "Ordinals",
    "OthersLoad",
    "Output",
    "Part",
    "Peer",
    "Peers",
    "Phases",
    "PrefillEnded",
    "Push",
    "Reached",
    "Renew",
    "RequestId",
    "ResetPrefixCache",
    "Role",
    "SampledToken",
    "Seconds",
    "Sequence64",
    "SetRole",
    "StartDecode",
    "StartPrefill",
    "StepTime",
    "Taken",
    "Text",
    "TicketId",
    "ToRouter",
    "ToWorker",
    "TokenLogprob",
    "Tokens",
    "WatchBlocks",
    "Welcome",
    "WorkerId",
    "WorkerLoad",
    "WorkerState",
    "check_ids",
    "pack_ids",
    "unpack_ids",
]


# ---- router → worker ----


class Welcome(Message, frozen=True):
    """The router knows this worker; commands may follow."""


class Peers(Message, frozen=True):
    """All workers now known. A decode worker opens a link to each prefill worker, and drops links to those gone."""

    peers: Annotated[list[Peer], msgspec.Meta(max_length=4096)]


class StartPrefill(Message, frozen=True):
    """Compute the KV of the prompt, hand it to `decode` under `ticket`, sample the first token of each choice."""

    request_id: RequestId
    attempt: Count
    ticket: TicketId
    prompt_ids: IdBytes
    params: SamplingParams
    decode_worker: WorkerId
    decode_epoch: Epoch
    timeout_s: Seconds  # from receipt; no work starts after it
    output_ids: IdBytes = b""  # tokens already produced by an earlier attempt (n = 1 only)
    cache_salt: Text = ""
    proof: Mac = NO_PROOF  # of the ticket, by the cluster's key: `core.tickets`


class StartDecode(Message, frozen=True):
    """Produce tokens.

    With a ticket the prompt's KV comes from `prefill_worker`; without one this worker prefills itself.
    """

    request_id: RequestId
    attempt: Count
    prompt_ids: IdBytes
    params: SamplingParams
    choices: Annotated[list[ChoiceState], msgspec.Meta(min_length=1, max_length=MAX_CHOICES)]
    timeout_s: Seconds
    ticket: TicketId | None = None
    prefill_worker: WorkerId | None = None
    prefill_epoch: Epoch | None = None
    cache_salt: Text = ""
    proof: Mac = NO_PROOF


class Abort(Message, frozen=True):
    """Stop this attempt (or one choice of it) and free what it holds. Unknown attempts are ignored and counted."""

    request_id: RequestId
    attempt: Count
    choice: Count | None = None


class Drain(Message, frozen=True):
    """Take nothing new, finish what runs, report state `draining`."""


class ResetPrefixCache(Message, frozen=True):
    """Forget all retained prefix blocks."""


class SetRole(Message, frozen=True):
    """From now on the worker is for this. What runs goes on, caches stay; the next heartbeat names the new role."""

    role: Role


class WatchBlocks(Message, frozen=True):
    """Tell this router which prefix blocks can be found on the worker: all of them, then what changes. A higher number
    begins anew.
    """

    watch: Sequence64


ToWorker = Welcome | Peers | StartPrefill | StartDecode | Abort | Drain | ResetPrefixCache | SetRole | WatchBlocks


class FromRouter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Envelope.

    `number` counts the commands to this worker from 1; a new `router_epoch` voids all attempts of the old one.
    `router` names the router among those that a worker serves. The worker goes by the connection that a frame came
    over, and overwrites what a frame says of it.
    """

    router_epoch: Epoch
    number: Sequence64
    body: ToWorker
    router: WorkerId = MAIN_ROUTER


# ---- worker → router ----


class Hello(Message, frozen=True):
    """First message of a worker, repeated until it is welcomed."""

    role: Role
    pid: Count
    fingerprint: Fingerprint
    total_blocks: Count
    max_sequence_tokens: Count  # longest prompt + output that this worker can hold
    bytes_per_token: Count  # KV bytes
    kv_address: Text
    transports: Annotated[list[Code], msgspec.Meta(max_length=16)]
    max_requests: Count = MAX_REQUESTS  # attempts that it takes at a time; it refuses what is beyond


class Heartbeat(Message, frozen=True):
    """Sent from a thread that no forward pass can starve, to each router for itself.

    `received` is the highest command number handled, `active` the attempts that live here: an attempt whose command
    is covered by `received` and that is not in `active` has ended or was never taken. `turn_age_s` tells how long ago
    the worker's loop began its last turn: it grows while a step computes, and without end when the engine hangs.
    `received` and `active` speak of this router's commands, `load` of the whole worker.
    """

    received: Sequence64
    state: WorkerState
    load: WorkerLoad
    active: Annotated[list[tuple[RequestId, Count]], msgspec.Meta(max_length=65536)]
    # peers, and the transport to each
    linked: Annotated[list[tuple[WorkerId, Epoch, Code]], msgspec.Meta(max_length=4096)]
    turn_age_s: Seconds = 0.0
    role: Role | None = None  # None: that of the Hello
    others: OthersLoad | None = None  # None: no other router has anything here
    news: tuple[Sequence64, Sequence64] | None = None  # watch and number of the last BlockNews for this router


class Tokens(Part, frozen=True):
    """Tokens of one choice, in order, the first with index `index`.

    With a finish_reason this is the choice's last message.
    """

    request_id: RequestId
    attempt: Count
    choice: Count
    index: Count
    tokens: Annotated[tuple[SampledToken, ...], msgspec.Meta(max_length=65536)]
    finish_reason: FinishReason | None = None
    stop_token: TokenId | None = None  # the id that ended it, not among `tokens`
    phases: Phases | None = None  # with index of the attempt's first token
    drafted: Count = 0  # tokens that the step verified for this choice beside the one that it computes anyway
    accepted: Count = 0  # of them, those that are among `tokens`
    wait_s: Seconds = 0.0  # from this choice's tokens before to the step that drew these


class Output(Message, frozen=True):
    """All tokens of one engine step."""

    items: Annotated[list[Tokens], msgspec.Meta(max_length=4096)]
    step: StepTime | None = None  # None: they come with a hand-off


class PrefillEnded(Message, frozen=True):
    """The prefill side of an attempt is over:

    handed over, or failed. Frees the router's accounting, never ends a request.
    """

    request_id: RequestId
    attempt: Count
    ok: bool
    code: Code = ""
    message: Text = ""


class AttemptFailed(Message, frozen=True):
    """The decode side of an attempt is over without an answer. With retriable the router tries elsewhere."""

    request_id: RequestId
    attempt: Count
    code: Code
    message: Text
    retriable: bool = False


class BlockNews(Message, frozen=True):
    """Prefix blocks that can be found since the news before, and those that no longer can; 8 bytes each
    (`core.block_names`). Numbered from 1 within a watch; the first names all that are there.
    """

    watch: Sequence64
    number: Sequence64
    stored: Digests = b""
    removed: Digests = b""


class Goodbye(Message, frozen=True):
    """Clean end of a worker after a drain."""


ToRouter = Hello | Heartbeat | Output | PrefillEnded | AttemptFailed | BlockNews | Goodbye


class FromWorker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Envelope: which incarnation of which worker speaks."""

    worker_id: WorkerId
    epoch: Epoch
    body: ToRouter
