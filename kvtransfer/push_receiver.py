"""The destination's bulk thread of one link: writes what was pushed where it was granted, checks it, and reports."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..core.errors import ProtocolError
from ..core.ids import BlockId, Ticket, WorkerKey
from ..engine.kv_memory import KVMemory
from ..protocol.messages import KvHello, Push, Taken
from .acceptance import Acceptances, Outcome, check_push
from .bulk import Bulk, NotTheirs, Span
from .conversion import Decoder, equal_parts
from .digest import DIGEST_BYTES, Digests, digests
from .effects import BlocksArrived, Revoked
from .link import OnEvent
from .outbox import Outbox
from .push_sender import layers_span

logger = logging.getLogger(__name__)

IsGiven = Callable[[int, int], bool]
Given = Mapping[int, BlockId]  # ordinal → the source's block
NO_GIFTS: Given = MappingProxyType({})

MAX_QUEUED = 4096  # announced pushes that have not been taken
_WARM_BYTES = 4 << 20


class PushReceiver:
    """`run` on the link's bulk-receiving thread. `reply` queues a control message."""

    def __init__(
        self,
        peer: WorkerKey,
        hello: KvHello,
        memory: KVMemory,
        bulk: Bulk,
        decoder: Decoder | None,
        on_event: OnEvent,
        reply: Callable[[Taken], None],
        digests_at: Digests = digests,
        is_given: IsGiven | None = None,
    ) -> None:
        """`is_given(block, generation)`: the source has given it to this worker, so its bytes stay where they are."""
        self._is_given = is_given
        self._peer, self._hello, self._memory, self._bulk, self._decoder = peer, hello, memory, bulk, decoder
        self._on_event, self._reply, self._digests_at = on_event, reply, digests_at
        self._announced: Outbox[Push] = Outbox(MAX_QUEUED)
        self.acceptances = Acceptances(memory.num_layers)

    def put(self, push: Push) -> None:
        """A push is announced; raises ProtocolError for one that no honest peer sends."""
        check_push(push, self._hello.num_blocks, self._memory.num_layers)
        if (push.staged is None) != (self._decoder is None):
            raise ProtocolError("a push in another wire format than the one agreed on")
        if not self._announced.put(push):
            raise ProtocolError(f"{MAX_QUEUED} pushes are announced and not taken")

    def run(self) -> None:
        """Until `stop`; raises OSError, ProtocolError or TransferFailed when the bulk connection breaks."""
        while not self._announced.closed:
            push = self._announced.take()
            if push is not None:
                self._receive(push)

    def stop(self) -> None:
        self._announced.close()

    def close(self) -> None:
        """After the thread has ended."""
        if self._decoder is not None:
            self._decoder.close()

    def _receive(self, push: Push) -> None:
        if self._decoder is not None:
            self._receive_converted(push, self._decoder)
        else:
            self._receive_blocks(push)

    def _receive_blocks(self, push: Push) -> None:
        layers = (push.first_layer, push.num_layers)
        source = [self._peer_span(slot, push) for slot in push.source_slots]
        claim = self.acceptances.claim(push)
        if claim is None:
            self._bulk.discard(source)
            return
        given = given_blocks(push, self._memory.num_layers, self._is_given)
        blocks = [given.get(ordinal, claim.table[ordinal]) for ordinal in push.ordinals]
        target = [layers_span(self._memory, block, *layers) for block in blocks]
        corrupt: list[int] = []
        for part in self._parts(len(blocks), target[0].nbytes):
            try:
                found = self._bulk.receive(source[part], target[part], lambda: self.acceptances.is_wanted(push))
            except NotTheirs as err:
                logger.info("a push that its source has withdrawn: %s", err)
                corrupt += push.ordinals[part]
                continue
            found = self._digests_at(self._memory.region, target[part]) if found is None else found
            corrupt += corrupt_ordinals(push, found, part.start)
        logger.debug("%s", _arrival(push))
        self._tell(push, self.acceptances.finish(push), corrupt, given)

    def _parts(self, count: int, nbytes: int) -> list[slice]:
        """Parts that stay in the caches until they are checked, where the transport can."""
        each = max(1, _WARM_BYTES // nbytes) if self._bulk.in_parts else count
        return [slice(start, min(start + each, count)) for start in range(0, count, each)]

    def _receive_converted(self, push: Push, decoder: Decoder) -> None:
        source, target = decoder.spans(push)
        claim = self.acceptances.claim(push)
        if claim is None:
            self._bulk.discard([source])
            self._reply(Taken())
            return
        self._bulk.receive([source], [target], lambda: self.acceptances.is_wanted(push))
        self._reply(Taken())
        places = equal_parts(target, len(push.ordinals))
        corrupt = corrupt_ordinals(push, self._digests_at(self._memory.region, places))
        if not corrupt and self.acceptances.is_wanted(push):
            decoder.decode(push, claim)
        self._tell(push, self.acceptances.finish(push), corrupt)

    def _peer_span(self, slot: int, push: Push) -> Span:
        """Both pools have one format, so a layer has one size."""
        return layers_span(self._memory, BlockId(slot), push.first_layer, push.num_layers)

    def _tell(self, push: Push, outcome: Outcome, corrupt: list[int], given: Given = NO_GIFTS) -> None:
        if corrupt:
            logger.warning("%d blocks of a push from %s differ from their digest", len(corrupt), self._peer)
        if outcome.revoked:
            self._on_event(Revoked(self._peer, Ticket(push.ticket)))
        elif outcome.arrived or corrupt:
            self._on_event(arrived_event(self._peer, push, outcome, corrupt, given))


def _arrival(push: Push) -> str:
    stop = push.first_layer + push.num_layers
    return f"layers {push.first_layer} to {stop} of {len(push.ordinals)} blocks from {push.ordinals[0]} on are here"


def corrupt_ordinals(push: Push, found: bytes, first: int = 0) -> list[int]:
    """Ordinals whose bytes are not those that were digested; `found` begins with the push's block number `first`."""
    wanted = push.digests[first * DIGEST_BYTES :][: len(found)]
    if found == wanted:
        return []
    count = len(found) // DIGEST_BYTES
    places = (slice(at * DIGEST_BYTES, (at + 1) * DIGEST_BYTES) for at in range(count))
    return [push.ordinals[first + at] for at, place in enumerate(places) if found[place] != wanted[place]]


def given_blocks(push: Push, num_layers: int, is_given: IsGiven | None) -> dict[int, BlockId]:
    """Ordinal → block, of the blocks that this push gives away. A block changes its owner whole, or is copied."""
    if is_given is None or push.num_layers != num_layers:
        return {}
    pairs = zip(push.ordinals, push.source_slots, strict=True)
    return {ordinal: BlockId(slot) for ordinal, slot in pairs if is_given(slot, push.generation)}


def arrived_event(
    peer: WorkerKey, push: Push, outcome: Outcome, corrupt: list[int], given: Given = NO_GIFTS
) -> BlocksArrived:
    """What the destination's table hears of a push that was written."""
    good = [at for at, ordinal in enumerate(outcome.arrived) if ordinal not in corrupt]
    return BlocksArrived(
        peer,
        Ticket(push.ticket),
        push.generation,
        tuple(outcome.arrived[at] for at in good),
        tuple(corrupt),
        tuple(outcome.digests[at] for at in good),
        tuple((outcome.arrived[at], given[outcome.arrived[at]]) for at in good if outcome.arrived[at] in given),
    )
