"""The source's bulk thread of one link: digests blocks, announces them on the control connection, sends their bytes.

A push leaves only with digests that were taken while its ticket lived: `Withdraw` comes before the worker can write to
the blocks again, and a digest taken after that goes nowhere. Bytes that change later differ from their digest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.ids import BlockId, Ticket
from ..engine.kv_memory import KVMemory
from ..protocol.messages import Done, Push
from .bulk import Bulk, Span
from .conversion import Encoder, equal_parts
from .digest import Digests, digests
from .effects import SendBlocks, Withdraw
from .outbox import Outbox
from .vouching import Vouchers

MAX_QUEUED = 16384  # effects waiting for the thread; a peer that lets so many pile up is as good as gone


@dataclass(frozen=True, slots=True)
class _Prepared:
    push: Push
    spans: list[Span]


class PushSender:
    """`run` on the link's bulk-sending thread; everything else from any thread. `tell` queues a control message."""

    def __init__(
        self,
        memory: KVMemory,
        bulk: Bulk,
        encoder: Encoder | None,
        tell: Callable[[Push | Done], None],
        digests_at: Digests = digests,
    ) -> None:
        self._memory, self._bulk, self._encoder, self._tell = memory, bulk, encoder, tell
        self._digests_at = digests_at
        self._outbox: Outbox[SendBlocks | Done | Withdraw] = Outbox(MAX_QUEUED)
        self._withdrawn: set[Ticket] = set()
        self._vouchers = Vouchers()

    def put(self, item: SendBlocks | Done) -> bool:
        """Queue blocks, or the Done behind them; False when the queue is at its bound."""
        return self._outbox.put(item)

    def withdraw(self, effect: Withdraw) -> None:
        """Nothing more leaves for this ticket."""
        self._withdrawn.add(effect.ticket)
        self._outbox.drop(lambda item: item.ticket == effect.ticket)
        self._outbox.put(effect)

    def run(self) -> None:
        """Until `stop`; raises OSError or TransferFailed when the bulk connection breaks."""
        while not self._outbox.closed:
            match self._outbox.take():
                case SendBlocks() as effect:
                    self._send(effect)
                case Done() as done if Ticket(done.ticket) not in self._withdrawn:
                    self._tell(self._vouchers.complete(done))
                case Withdraw(ticket=ticket):
                    self._vouchers.forget(ticket)
                    self._withdrawn.discard(ticket)
                case _:
                    continue

    def taken(self) -> None:
        """The destination has taken the oldest converted push."""
        if self._encoder is not None:
            self._encoder.taken()

    def stop(self) -> None:
        self._outbox.close()
        if self._encoder is not None:
            self._encoder.stop()

    def close(self) -> None:
        """After the thread has ended."""
        if self._encoder is not None:
            self._encoder.close()

    def _send(self, effect: SendBlocks) -> None:
        prepared = self._prepare(effect)
        if effect.ticket in self._withdrawn:
            if self._encoder is not None:
                self._encoder.abandon()
            return
        self._vouchers.note(prepared.push)
        self._tell(prepared.push)
        self._bulk.send(prepared.spans)

    def _prepare(self, effect: SendBlocks) -> _Prepared:
        if self._encoder is not None:
            span = self._encoder.encode(effect)
            places = equal_parts(span, len(effect.ordinals))
            return _Prepared(push_of(effect, self._digests(places), [], span.offset), [span])
        layers = (effect.first_layer, effect.num_layers)
        spans = [layers_span(self._memory, block_id, *layers) for block_id in effect.block_ids]
        return _Prepared(push_of(effect, self._digests(spans), list(effect.block_ids), None), spans)

    def _digests(self, spans: list[Span]) -> bytes:
        return self._digests_at(self._memory.region, spans)


def layers_span(memory: KVMemory, block_id: BlockId, first_layer: int, num_layers: int) -> Span:
    """Where these layers of one block lie."""
    return Span(block_id * memory.block_bytes + first_layer * memory.layer_bytes, num_layers * memory.layer_bytes)


def push_of(effect: SendBlocks, digests: bytes, slots: list[int], staged: int | None) -> Push:
    """What announces these blocks. `staged`: where their wire blocks lie, None for blocks as they are."""
    return Push(
        ticket=effect.ticket,
        generation=effect.generation,
        first_layer=effect.first_layer,
        num_layers=effect.num_layers,
        ordinals=list(effect.ordinals),
        digests=digests,
        source_slots=slots,
        staged=staged,
    )
