"""Every message on the wire, as msgspec structs; their encoding is MessagePack.

Families are named after the receiver:

    ToWorker    router → worker        ToRouter    worker → router        HandoffMessage    worker ↔ worker

Every field has a type and a bound, unknown fields are refused, so decoding is validation. Token ids travel as little-
endian int32 bytes (`pack_ids`, `unpack_ids`). No message carries an address or a size that the receiver has not
granted; the one place where a worker names where it listens is `Hello`, and only the router passes that on.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np

from ..core.errors import ProtocolError
from .sampling import MAX_CHOICES, MAX_LOGPROBS, SamplingParams, TokenId

PROTOCOL_VERSION = 2
MAX_PROMPT_BYTES = 4 * (1 << 20)
MAX_BLOCKS = 1 << 20

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Sequence64 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
WorkerId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Epoch = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
TicketId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Mac = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Digests = Annotated[bytes, msgspec.Meta(max_length=8 << 20)]  # 8 bytes each
IdBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_PROMPT_BYTES)]
Text = Annotated[str, msgspec.Meta(max_length=1000)]
Code = Annotated[str, msgspec.Meta(max_length=64)]
Ordinals = Annotated[list[Count], msgspec.Meta(max_length=MAX_BLOCKS)]
NO_PROOF = bytes(16)
Role = Literal["prefill", "decode", "both"]
WorkerState = Literal["starting", "ready", "draining", "stalled"]  # stalled: its loop does not turn
FinishReason = Literal["stop", "length"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag=True):
    """Base of all messages; the tag on the wire is the class name."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of the pieces inside messages."""


def pack_ids(token_ids: list[int]) -> bytes:
    return np.asarray(token_ids, dtype="<i4").tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """Token ids as a list; raises ProtocolError for a torn array or a negative id."""
    if len(data) % 4:
        raise ProtocolError(f"token ids: {len(data)} bytes is not a whole number of int32")
    ids = np.frombuffer(data, dtype="<i4")
    if ids.size and int(ids.min()) < 0:
        raise ProtocolError(f"token ids: {int(ids.min())} is negative")
    result: list[int] = ids.tolist()
    return result


# ---- pieces ----


CONVERTIBLE_DTYPES = frozenset({"float32", "bfloat16", "float16"})


class Fingerprint(Part, frozen=True):
    """What two workers must agree on before a block may move. Compared field by field; a difference is named.

    Cache dtype and block size may differ when both dtypes can be converted into each other.
    """

    model: Text
    weights: Text  # digest of the weights' identity, not of every byte
    dtype: Code
    num_layers: Count
    num_kv_heads: Count
    head_dim: Count
    block_size: Count
    layout: Code  # name of the memory layout of a block
    protocol: Count = PROTOCOL_VERSION

    def difference(self, other: Fingerprint) -> str | None:
        """None when equal, else one sentence that names the first differing field and both values."""
        for field in self.__struct_fields__:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs and not self._bridges(field, other):
                return f"{field} differs: {mine!r} here, {theirs!r} there"
        return None

    def is_same_format(self, other: Fingerprint) -> bool:
        """Blocks of one are blocks of the other, byte by byte."""
        return self.dtype == other.dtype and self.block_size == other.block_size

    def _bridges(self, field: str, other: Fingerprint) -> bool:
        return field in ("dtype", "block_size") and {self.dtype, other.dtype} <= CONVERTIBLE_DTYPES


class TokenLogprob(Part, frozen=True):
    """logprob of the chosen token, and the most likely alternatives as (token id, logprob), best first."""

    logprob: float
    top: Annotated[tuple[tuple[TokenId, float], ...], msgspec.Meta(max_length=MAX_LOGPROBS)] = ()


class SampledToken(Part, frozen=True):
    token_id: TokenId
    logprob: TokenLogprob | None = None


class ChoiceState(Part, frozen=True):
    """One of the n choices of a request, with the tokens it has already produced."""

    choice: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHOICES)]
    output_ids: IdBytes = b""


class Phases(Part, frozen=True):
    """Where the time to the first token went, in seconds. They add up to the worker's share of TTFT."""

    queue_s: Seconds = 0.0  # in prefill's queue
    prefill_s: Seconds = 0.0  # first chunk scheduled to last chunk computed
    transfer_s: Seconds = 0.0  # last chunk computed to all blocks verified on decode
    cached_tokens: Count = 0  # prompt tokens whose KV came from a prefix cache
    transferred_blocks: Count = 0
    transferred_bytes: Sequence64 = 0


class WorkerLoad(Part, frozen=True):
    """What a worker says about itself with each heartbeat."""

    total_blocks: Count = 0
    free_blocks: Count = 0  # blocks that can be allocated now, retained prefix blocks included
    cached_blocks: Count = 0  # of the free ones, those that hold a retained prefix
    running: Count = 0
    waiting: Count = 0
    receiving: Count = 0  # hand-offs granted and not complete
    handing_off: Count = 0  # prefills computed, not yet acknowledged by decode
    queued_tokens: Count = 0  # prompt tokens not yet computed
    preemptions: Sequence64 = 0
    parked: Sequence64 = 0  # of the preempted sequences, those copied to host memory
    unparked: Sequence64 = 0  # and those copied back
    parked_bytes: Sequence64 = 0  # in host memory now
    corrupt_parked_blocks: Sequence64 = 0  # came back other than they went out, and were computed again
    steps: Sequence64 = 0
    prefix_hit_tokens: Sequence64 = 0
    prefix_query_tokens: Sequence64 = 0
    transferred_bytes: Sequence64 = 0
    transferred_blocks: Sequence64 = 0
    given_blocks: Sequence64 = 0  # of the transferred ones, those that changed their owner and did not move
    failed_handoffs: Sequence64 = 0
    stale_messages: Sequence64 = 0


class Peer(Part, frozen=True):
    """A worker as the router introduces it to another."""

    worker_id: WorkerId
    epoch: Epoch
    role: Role
    kv_address: Text  # where its hand-off listener is; announced by the worker itself, passed on by the router only


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


ToWorker = Welcome | Peers | StartPrefill | StartDecode | Abort | Drain | ResetPrefixCache


class FromRouter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Envelope.

    `number` counts the commands to this worker from 1; a new `router_epoch` voids all attempts of the old one.
    """

    router_epoch: Epoch
    number: Sequence64
    body: ToWorker


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


class Heartbeat(Message, frozen=True):
    """Sent from a thread that no forward pass can starve.

    `received` is the highest command number handled, `active` the attempts that live here: an attempt whose command
    is covered by `received` and that is not in `active` has ended or was never taken. `turn_age_s` tells how long ago
    the worker's loop began its last turn: it grows while a step computes, and without end when the engine hangs.
    """

    received: Sequence64
    state: WorkerState
    load: WorkerLoad
    active: Annotated[list[tuple[RequestId, Count]], msgspec.Meta(max_length=65536)]
    # peers, and the transport to each
    linked: Annotated[list[tuple[WorkerId, Epoch, Code]], msgspec.Meta(max_length=4096)]
    turn_age_s: Seconds = 0.0


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


class Output(Message, frozen=True):
    """All tokens of one engine step."""

    items: Annotated[list[Tokens], msgspec.Meta(max_length=4096)]


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


class Goodbye(Message, frozen=True):
    """Clean end of a worker after a drain."""


ToRouter = Hello | Heartbeat | Output | PrefillEnded | AttemptFailed | Goodbye


class FromWorker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Envelope: which incarnation of which worker speaks."""

    worker_id: WorkerId
    epoch: Epoch
    body: ToRouter


# ---- worker ↔ worker: the hand-off ----


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
    wire_dtypes: Annotated[list[Code], msgspec.Meta(max_length=16)] = []  # allowed, the preferred one first
    digests: bool = True
    offers: Annotated[
        dict[Code, Annotated[bytes, msgspec.Meta(max_length=32 << 10)]], msgspec.Meta(max_length=16)
    ] = {}  # what each transport wants the peer to know
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
    source_slots: Ordinals = []
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
