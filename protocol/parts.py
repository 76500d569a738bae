"""What messages are made of: bounded scalars, the bases, and the pieces that several messages share."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from ..core.errors import ProtocolError
from ..core.prefix_hash import hash_key
from .sampling import MAX_CHOICES, MAX_LOGPROBS, TokenId

PROTOCOL_VERSION = 4
MAX_PROMPT_BYTES = 4 * (1 << 20)
MAX_BLOCKS = 1 << 20
MAX_REQUESTS = 1024  # attempts that a worker takes at a time, unless its Hello says otherwise

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
    result: list[int] = _checked(data).tolist()
    return result


def check_ids(data: bytes) -> None:
    """Raises ProtocolError as `unpack_ids` does, in a fraction of the time."""
    _checked(data)


def _checked(data: bytes) -> npt.NDArray[np.int32]:
    if len(data) % 4:
        raise ProtocolError(f"token ids: {len(data)} bytes is not a whole number of int32")
    ids = np.frombuffer(data, dtype="<i4")
    if ids.size and int(ids.min()) < 0:
        raise ProtocolError(f"token ids: {int(ids.min())} is negative")
    return ids


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

    def cache_key(self, salt: str) -> bytes:
        """The prefix-cache key of one tenant: the salt, and everything that changes the bytes of a block."""
        return hash_key(salt, f"{self.model}/{self.weights}", f"{self.layout}/{self.dtype}/{self.block_size}")

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
    """Where the time to the first token went, in seconds. queue_s, prefill_s and transfer_s add up to the worker's
    share of TTFT; the others say what was in them.
    """

    queue_s: Seconds = 0.0  # in prefill's queue
    prefill_s: Seconds = 0.0  # first chunk scheduled to last chunk computed
    transfer_s: Seconds = 0.0  # last chunk computed to all blocks verified on decode
    compute_s: Seconds = 0.0  # of prefill_s: within steps that computed a chunk of it
    first_step_s: Seconds = 0.0  # of compute_s: the step that drew the first token
    work_s: Seconds = 0.0  # its share of those steps by tokens: about what it would have taken alone
    room_s: Seconds = 0.0  # of transfer_s: decode had no room yet for all that was computed
    cached_tokens: Count = 0  # prompt tokens whose KV came from a prefix cache
    transferred_blocks: Count = 0
    transferred_bytes: Sequence64 = 0


class StepTime(Part, frozen=True):
    """The step that drew the tokens of an Output, in seconds."""

    step_s: Seconds = 0.0
    prompts_s: Seconds = 0.0  # of step_s: what prompt chunks in it took, by what such steps take without any


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
    busy_s: Seconds = 0.0  # within steps, since the worker's start
    prefill_tokens: Sequence64 = 0  # prompt tokens computed
    decode_tokens: Sequence64 = 0  # tokens drawn behind a first one
    prefix_hit_tokens: Sequence64 = 0
    prefix_query_tokens: Sequence64 = 0
    transferred_bytes: Sequence64 = 0
    transferred_blocks: Sequence64 = 0
    given_blocks: Sequence64 = 0  # of the transferred ones, those that changed their owner and did not move
    failed_handoffs: Sequence64 = 0
    stale_messages: Sequence64 = 0
    drafts: Sequence64 = 0  # steps of a sequence that verified drafted tokens
    drafted_tokens: Sequence64 = 0
    accepted_tokens: Sequence64 = 0  # of the drafted ones
    accepted_at: Annotated[tuple[Sequence64, ...], msgspec.Meta(max_length=64)] = ()  # by place in the draft


class OthersLoad(Part, frozen=True):
    """What attempts of other routers take on a worker, reckoned as a router reckons its own (`router.registry`)."""

    attempts: Count = 0
    blocks: Count = 0  # that those decoding here need for their next tokens
    streams: Count = 0  # open choices that decode here, those that wait for their first token included
    running: Count = 0  # of them, those that have had it
    queued_tokens: Count = 0  # prompt tokens to be computed here


class Peer(Part, frozen=True):
    """A worker as the router introduces it to another."""

    worker_id: WorkerId
    epoch: Epoch
    role: Role
    kv_address: Text  # where its hand-off listener is; announced by the worker itself, passed on by the router only
