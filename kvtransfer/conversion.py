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
from .layout import CacheLayout, Copy, plan
from .staging import StagingArea

if TYPE_CHECKING:
    import torch

_SLOTS = 3  # pushes that may wait in staging for the destination to take them
_SLOT_BYTES = 16 << 20  # twice the largest push: float16 and bfloat16 meet in float32


class WireCodec:
    """The shapes of one direction of one link: the source's blocks, the wire's, and ours."""

    def __init__(self, memory: KVMemory, mine: Fingerprint, source: Fingerprint, wire_dtype: str) -> None:
        import torch

        from ..kernels.wire_format import op
        from ..kernels.wire_format.formats import wire_layer_bytes

        self._torch, self._op, self._wire_dtype = torch, op, wire_dtype
        self._region, self._dtype = memory.region, getattr(torch, mine.dtype)
        self._heads, self._dim, self._source_size = mine.num_kv_heads, mine.head_dim, source.block_size
        shape = (memory.num_blocks, memory.num_layers, 2, mine.block_size, mine.num_kv_heads, mine.head_dim)
        self._bytes = np.frombuffer(memory.buffer, np.uint8).reshape(memory.num_blocks, memory.block_bytes)
        self._pool: torch.Tensor = torch.from_numpy(self._bytes).view(self._dtype).view(shape)
        self._from, self._to = (
            CacheLayout(memory.num_layers, self._heads, self._dim, self._dtype.itemsize, size)
            for size in (source.block_size, mine.block_size)
        )
        self.layer_bytes = wire_layer_bytes(source.block_size, self._heads, self._dim, wire_dtype)

    def encode(self, block_ids: Sequence[BlockId], first_layer: int, num_layers: int, offset: int) -> None:
        """Blocks of our pool → wire blocks at `offset` of the region, block by block and layer by layer."""
        kv = self._pool[list(block_ids), first_layer : first_layer + num_layers].flatten(0, 1)
        self._op.encode(kv, self._wire_blocks(offset, kv.shape[0]), self._wire_dtype)

    def decode(self, push: Push, claim: Claim, offset: int) -> None:
        """Wire blocks at `offset` of the region → the tokens they hold, in the blocks of `claim`."""
        count = len(push.ordinals) * push.num_layers
        kv = self._torch.empty((count, 2, self._source_size, self._heads, self._dim), dtype=self._dtype)
        self._op.decode(self._wire_blocks(offset, count), kv, self._wire_dtype)
        # From here on it is bytes: a block of the source's size in our dtype, and the plan says where its parts go.
        blocks = kv.view(len(push.ordinals), -1).view(self._torch.uint8).numpy()
        first, skipped = push.ordinals[0], push.first_layer * 2 * self._from.plane_bytes
        for copy in self._plan(push, claim):
            at = copy.source_offset - skipped
            part = blocks[copy.source_ordinal - first, at : at + copy.nbytes]
            to = copy.target_offset
            self._bytes[claim.table[copy.target_ordinal], to : to + copy.nbytes] = part

    def _plan(self, push: Push, claim: Claim) -> list[Copy]:
        first, stop = push.ordinals[0] * self._source_size, (push.ordinals[-1] + 1) * self._source_size
        layers = range(push.first_layer, push.first_layer + push.num_layers)
        return plan(self._from, self._to, range(first, min(stop, claim.num_tokens)), layers)

    def _wire_blocks(self, offset: int, count: int) -> torch.Tensor:
        """[count, wire layer bytes] uint8, a view of the region."""
        nbytes = count * self.layer_bytes
        view = np.frombuffer(self._region[offset : offset + nbytes], np.uint8)
        return self._torch.from_numpy(view).view(count, self.layer_bytes)


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

    def abandon(self) -> None:
        """The push encoded last never leaves: its slot is free again at once."""
        with self._changed:
            self._free.append(self._used.pop())

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
        if push.ordinals != list(range(push.ordinals[0], push.ordinals[0] + len(push.ordinals))):
            raise ProtocolError("a converted push names blocks that are not neighbours")
        region, staged = region_bytes(self._hello), push.staged
        if staged is None or staged < region - self._hello.staging_bytes or staged + nbytes > region:
            raise ProtocolError(
                f"a push converted at {staged}, {nbytes} bytes; that is not in the peer's staging memory"
            )
        if nbytes > _SLOT_BYTES:
            raise ProtocolError(f"a push of {nbytes} bytes; a staging slot has {_SLOT_BYTES}")
        return Span(staged, nbytes), Span(self._span.offset, nbytes)

    def decode(self, push: Push, claim: Claim) -> None:
        self._codec.decode(push, claim, self._span.offset)

    def close(self) -> None:
        self._staging.give_back(self._span)


def equal_parts(span: Span, count: int) -> list[Span]:
    """Where each of `count` blocks of a converted push lies."""
    each = span.nbytes // count
    return [Span(span.offset + at * each, each) for at in range(count)]
