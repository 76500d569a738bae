"""Blocks: who holds them (I4), who may write them (I5), and what is in them (I6).

Knows the messages, the effects and the pools; digests, tables of the hand-off and the roles' state are not believed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from ..core.ids import BlockId, Ticket, WorkerKey
from ..engine.block_pool import BlockPool
from ..kvtransfer.effects import AcceptBlocks, SendBlocks
from ..protocol.messages import Done, Push, StartPrefill, unpack_ids
from .fake_engine import kv_values
from .invariants import InvariantBroken, guarded
from .sim_worker import SimWorker

FULL_AUDIT_EVERY = 16


@dataclass(slots=True)
class _Incoming:
    """What a destination has opened for writing: its own blocks with the generation that each had then."""

    table: tuple[BlockId, ...] = ()
    num_tokens: int = 0
    generations: dict[BlockId, int] = field(default_factory=dict)
    given: dict[int, BlockId] = field(default_factory=dict)  # ordinal → the source's block, found in its place

    def final_table(self) -> tuple[BlockId, ...]:
        return tuple(self.given.get(ordinal, block) for ordinal, block in enumerate(self.table))


@dataclass(slots=True)
class _Outgoing:
    """What a source has pushed: the layers of each ordinal as a bit mask, and the generation of each block then."""

    layers: dict[int, int] = field(default_factory=dict)
    generations: dict[BlockId, int] = field(default_factory=dict)


class BlockWatch:
    """One for a whole simulated cluster."""

    def __init__(self) -> None:
        self._tokens: dict[Ticket, list[int]] = {}
        self._kv: dict[Ticket, list[array[int]]] = {}
        self._incoming: dict[tuple[WorkerKey, Ticket], _Incoming] = {}
        self._outgoing: dict[tuple[WorkerKey, Ticket], _Outgoing] = {}
        self._acknowledged: set[tuple[WorkerKey, Ticket]] = set()
        self._num_turns = 0
        self.check_memory: Callable[[], None] | None = None  # where all workers share one

    # ---- I4 ----

    def turned(self, worker: SimWorker, *, is_changed: bool) -> None:
        """Where something happened, the owners of every block are recounted; every now and then, and on any doubt, also
        places, hashes and tables.

        That loses nothing: a wrong owner is seen at once, and what is wrong in the rest does not heal by itself.
        """
        self._num_turns += 1
        is_due = self._num_turns % FULL_AUDIT_EVERY == 0
        if is_due or (is_changed and not _is_balanced(worker.pool, worker)):
            self.audit(worker)
        if self.check_memory is not None:
            self.check_memory()

    def audit(self, worker: SimWorker) -> None:
        with guarded("I4", worker.key, "blocks"):
            worker.core.check_invariants()
            if worker.decode is not None:
                worker.decode.check_invariants()
            if not _is_balanced(worker.pool, worker):
                raise InvariantBroken(f"I4 {worker.key}: free and owned blocks are not {worker.pool.num_blocks}")
        with guarded("I5", worker.key, "hand-off table"):
            worker.source.check_invariants()
            worker.destination.check_invariants()

    # ---- what is said and done ----

    def dispatched(self, message: StartPrefill) -> None:
        self._tokens[Ticket(message.ticket)] = unpack_ids(message.prompt_ids + message.output_ids)

    def accepts(self, worker: SimWorker, effect: AcceptBlocks) -> None:
        """From now on the blocks of this hand-off may be written."""
        item = self._incoming.setdefault((worker.key, effect.ticket), _Incoming())
        item.table, item.num_tokens = effect.table, effect.num_tokens
        for block in effect.table[effect.first :]:
            item.generations.setdefault(block, worker.pool.generation(block))

    def pushes(self, worker: SimWorker, effect: SendBlocks) -> None:
        item = self._outgoing.setdefault((worker.key, effect.ticket), _Outgoing())
        item.generations |= {block: worker.pool.generation(block) for block in effect.block_ids}

    def pushed(self, source: WorkerKey, push: Push) -> None:
        """A push is really on its way."""
        item = self._outgoing.setdefault((source, Ticket(push.ticket)), _Outgoing())
        mask = ((1 << push.num_layers) - 1) << push.first_layer
        for ordinal in push.ordinals:
            item.layers[ordinal] = item.layers.get(ordinal, 0) | mask

    # ---- I5 ----

    def writes(self, source: SimWorker | None, target: SimWorker | None, push: Push, slot: int, block: int) -> None:
        """A write goes only into a block that a live hand-off owns, and its source has kept what it reads from."""
        ticket, slot_id, block_id = Ticket(push.ticket), BlockId(slot), BlockId(block)
        if target is not None:
            incoming = self._incoming.get((target.key, ticket))
            generation = incoming.generations.get(block_id) if incoming is not None else None
            is_held = block_id in target.pool and target.pool.ref_count(block_id) == 1
            is_open = ticket in target.destination.active() and is_held
            if not is_open or generation != target.pool.generation(block_id):
                raise InvariantBroken(f"I5 {target.key}: write into block {block} that its hand-off does not own")
        if source is not None and ticket in source.source.active():
            outgoing = self._outgoing.get((source.key, ticket))
            generation = outgoing.generations.get(slot_id) if outgoing is not None else None
            if (
                slot_id not in source.pool
                or source.pool.ref_count(slot_id) < 1
                or generation != source.pool.generation(slot_id)
            ):
                raise InvariantBroken(f"I5 {source.key}: block {slot} was freed before its hand-off ended")

    def stays(self, target: SimWorker | None, push: Push, ordinal: int, block: int) -> None:
        """A block changes its owner only for a live hand-off, and only one that has not come otherwise."""
        if target is None:
            return
        incoming = self._incoming.get((target.key, Ticket(push.ticket)))
        if incoming is None or Ticket(push.ticket) not in target.destination.active() or ordinal in incoming.given:
            raise InvariantBroken(f"I5 {target.key}: block {block} stays for a hand-off that does not wait for it")
        incoming.given[ordinal] = BlockId(block)

    # ---- I6 ----

    def finishes(self, source: WorkerKey, done: Done, num_layers: int) -> None:
        """Done speaks of blocks that have left in all layers."""
        item = self._outgoing.get((source, Ticket(done.ticket)), _Outgoing())
        whole = sum(mask == (1 << num_layers) - 1 for mask in item.layers.values())
        if whole != done.num_blocks:
            raise InvariantBroken(f"I6 {source}: Done speaks of {done.num_blocks} blocks, {whole} have left whole")

    def acknowledges(self, worker: SimWorker, ticket: Ticket) -> None:
        """Decode takes the hand-off for complete: byte for byte it is what the request's tokens give.

        The same word may be said again later, when the blocks have other owners.
        """
        if (worker.key, ticket) in self._acknowledged:
            return
        self._acknowledged.add((worker.key, ticket))
        incoming = self._incoming.get((worker.key, ticket))
        if incoming is None or ticket not in self._tokens:
            raise InvariantBroken(f"I6 {worker.key}: acknowledges {ticket.hex()[:8]}, of which nothing can have come")
        if ticket not in self._kv:
            self._kv[ticket] = kv_values(self._tokens[ticket], worker.engine.memory.num_layers)
        for layer, column in enumerate(self._kv[ticket]):
            found = worker.engine.read(incoming.final_table(), layer, incoming.num_tokens)
            if found != column.tobytes():
                token = _first_difference(found, column.tobytes())
                raise InvariantBroken(
                    f"I6 {worker.key}: hand-off {ticket.hex()[:8]}, layer {layer}: wrong KV from token {token} on"
                )


def _is_balanced(pool: BlockPool, worker: SimWorker) -> bool:
    """Every reference has an owner, every owner a reference, and the others can be allocated."""
    held: dict[BlockId, int] = {}
    for role in worker.core.roles:
        for table in role.owners():
            for block in table:
                held[block] = held.get(block, 0) + 1
    return len(held) + pool.num_free_blocks == pool.num_blocks and all(
        pool.ref_count(block) == count for block, count in held.items()
    )


def _first_difference(found: bytes, expected: bytes) -> int:
    """The first token, of 8 bytes, in which two columns differ."""
    pairs = zip(found, expected, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(found), len(expected))) // 8
