"""Converting blocks on their way: encode at the source into staging memory, decode at the destination out of it.

Both ends know from the handshake what a wire block is, so its size never comes from the wire. torch is imported when
the first link needs it: most links move blocks as they are.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import ProtocolError, TransferFailed
from ..core.ids import BlockId
from ..engine.kv_memory import KVMemory
from ..protocol.messages import Fingerprint, KvHello, Push
from .acceptance import Claim
from .bulk import Span
from .effects import SendBlocks
from .identity import region_bytes
from .staging import StagingArea

if TYPE_CHECKING:
    import torch

_SLOTS = 3  # pushes that may wait in staging for the destination to take them
_SLOT_BYTES = 16 << 20  # twice the largest push: float16 and bfloat16 meet in float32


class WireCodec:
    """The shapes of one direction of one link: the source's blocks, the wire's, and ours or the peer's."""

    def __init__(self, memory: KVMemory, mine: Fingerprint, source: Fingerprint, wire_dtype: str) -> None:
        import torch

        from ..kernels.wire_format import op

        self._torch, self._op, self._wire_dtype = torch, op, wire_dtype
        self._heads, self._dim, self._source_size = mine.num_kv_heads, mine.head_dim, source.block_size
        self._own_size = mine.block_size
        dtype = getattr(torch, mine.dtype)
        shape = (memory.num_blocks, memory.num_layers, 2, mine.block_size, mine.num_kv_heads, mine.head_dim)
        self._pool: torch.Tensor = torch.from_numpy(np.frombuffer(memory.buffer, np.uint8)).view(dtype).view(shape)
        self._dtype = dtype
        self._region = memory.region
        self.layer_bytes = op.wire_layer_bytes(source.block_size, self._heads, self._dim, wire_dtype)

    def encode(self, block_ids: Sequence[BlockId], first_layer: int, num_layers: int, offset: int) -> None:
        """Blocks of our pool → wire blocks at `offset` of the region, block by block and layer by layer."""
        kv = self._pool[list(block_ids), first_layer : first_layer + num_layers].flatten(0, 1)
        self._op.encode(kv, self._wire_blocks(offset, kv.shape[0]), self._wire_dtype)

    def decode(self, push: Push, claim: Claim, offset: int) -> None:
        """Wire blocks at `offset` of the region → the tokens they hold, in the blocks of `claim`."""
        count = len(push.ordinals) * push.num_layers
        shape = (count, 2, self._source_size, self._heads, self._dim)
        kv = self._torch.empty(shape, dtype=self._dtype)
        self._op.decode(self._wire_blocks(offset, count), kv, self._wire_dtype)
        kv = kv.view(len(push.ordinals), push.num_layers, *shape[1:])
        layers = slice(push.first_layer, push.first_layer + push.num_layers)
        for block, ordinal in zip(kv, push.ordinals, strict=True):
            self._scatter(block, ordinal * self._source_size, layers, claim)

    def _scatter(self, block: torch.Tensor, first_token: int, layers: slice, claim: Claim) -> None:
        """One block of the source, [num_layers, 2, block_size, num_kv_heads, head_dim], into one or more of ours."""
        stop_token = min(first_token + self._source_size, claim.num_tokens)
        at = first_token
        while at < stop_token:
            index, slot = divmod(at, self._own_size)
            count = min(self._own_size - slot, stop_token - at)
            self._pool[claim.table[index], layers, :, slot : slot + count] = block[
                :, :, at - first_token : at - first_token + count
            ]
            at += count

    def _wire_blocks(self, offset: int, count: int) -> torch.Tensor:
        """[count, wire layer bytes] uint8, a view of the region."""
        nbytes = count * self.layer_bytes
        view = np.frombuffer(self._region[offset : offset + nbytes], np.uint8)
        return self._torch.from_numpy(view).view(count, self.layer_bytes)

    def view(self, offset: int, nbytes: int) -> memoryview:
        return self._region[offset : offset + nbytes]


class Encoder:
    """The source's end: a ring of staging slots, each free again when the destination has taken it."""

    def __init__(self, codec: WireCodec, staging: StagingArea) -> None:
        self._codec, self._staging = codec, staging
        self._span = staging.take(_SLOTS * _SLOT_BYTES)
        self._free = deque(self._span.offset + at * _SLOT_BYTES for at in range(_SLOTS))
        self._used: deque[int] = deque()
        self._changed = threading.Condition()
        self._stopped = False

    def encode(self, effect: SendBlocks) -> Span:
        """Convert, when a slot is free. Raises TransferFailed when the link ends meanwhile."""
        nbytes = len(effect.block_ids) * effect.num_layers * self._codec.layer_bytes
        if nbytes > _SLOT_BYTES:
            raise TransferFailed(f"a push of {nbytes} bytes does not fit a staging slot of {_SLOT_BYTES}")
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._stopped)
            if self._stopped:
                raise TransferFailed("the link is over")
            offset = self._free.popleft()
            self._used.append(offset)
        self._codec.encode(effect.block_ids, effect.first_layer, effect.num_layers, offset)
        return Span(offset, nbytes)

    def taken(self) -> None:
        """The destination has taken the oldest push. Raises ProtocolError when there is none."""
        with self._changed:
            if not self._used:
                raise ProtocolError("the peer has taken a push that was not sent")
            self._free.append(self._used.popleft())
            self._changed.notify_all()

    def digest_views(self, span: Span, count: int) -> list[memoryview]:
        """The bytes of each of `count` blocks within an encoded push."""
        return _split(self._codec, span, count)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        self._staging.give_back(self._span)


class Decoder:
    """The destination's end: one staging slot, into which pushes come one after the other."""

    def __init__(self, codec: WireCodec, staging: StagingArea, hello: KvHello) -> None:
        self._codec, self._staging, self._hello = codec, staging, hello
        self._span = staging.take(_SLOT_BYTES)

    def spans(self, push: Push) -> tuple[Span, Span]:
        """Where the push lies at the peer and where it comes to here; raises ProtocolError for an impossible one."""
        nbytes = len(push.ordinals) * push.num_layers * self._codec.layer_bytes
        region, staged = region_bytes(self._hello), push.staged
        if staged is None or staged < region - self._hello.staging_bytes or staged + nbytes > region:
            raise ProtocolError(
                f"a push converted at {staged}, {nbytes} bytes; that is not in the peer's staging memory"
            )
        if nbytes > _SLOT_BYTES:
            raise ProtocolError(f"a push of {nbytes} bytes; a staging slot has {_SLOT_BYTES}")
        return Span(staged, nbytes), Span(self._span.offset, nbytes)

    def digest_views(self, span: Span, count: int) -> list[memoryview]:
        return _split(self._codec, span, count)

    def decode(self, push: Push, claim: Claim) -> None:
        self._codec.decode(push, claim, self._span.offset)

    def close(self) -> None:
        self._staging.give_back(self._span)


def _split(codec: WireCodec, span: Span, count: int) -> list[memoryview]:
    each = span.nbytes // count
    return [codec.view(span.offset + at * each, each) for at in range(count)]
