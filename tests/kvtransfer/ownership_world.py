"""Three workers on one ledger, with a random history: hand-offs, losses, and deaths between any two stores.

Memory holds one number for each block. Whoever references a block writes a new number into it, and reads it again after
every event: a block that two pools think is theirs does not keep it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.core.ids import BlockId
from penstock.core.prefix_hash import BlockHash
from penstock.engine.block_pool import BlockPool
from penstock.engine.ledger import Ledger, ledger_bytes
from penstock.kvtransfer.ownership import Candidates, Ownership, check_conservation, first_pool, is_given

SHARES = (7, 5, 5)
BLOCK_SIZE = 4
Numbers = dict[BlockId, int]  # what must be in these blocks


class Killed(BaseException):
    """The worker dies before this store."""


class FusedLedger(Ledger):
    """One worker's mapping of the words; with `fuse` = k the worker dies before its store number k."""

    fuse: int | None = None

    def _store(self, block_id: BlockId, word: int) -> None:
        if self.fuse is not None:
            if self.fuse == 0:
                raise Killed
            self.fuse -= 1
        super()._store(block_id, word)


@dataclass(eq=False)
class Seq:
    """`table` in order; each block has one reference of this sequence. `handed`: its hand-off has begun."""

    table: list[BlockId]
    numbers: Numbers
    hashes: list[BlockHash]
    num_found: int = 0
    handed: bool = False


@dataclass(eq=False)
class Incarnation:
    """One life of one worker."""

    number: int
    ledger: FusedLedger
    pool: BlockPool
    ownership: Ownership
    seqs: list[Seq] = field(default_factory=list)
    granted: dict[int, list[BlockId]] = field(default_factory=dict)  # generation → blocks
    generation: int = 0
    is_alive: bool = True


@dataclass(eq=False)
class Handoff:
    """From the grant on; `numbers` and `given` are set when the source has given and pushed."""

    source: Incarnation
    destination: Incarnation
    generation: int
    seq: Seq
    numbers: list[int] = field(default_factory=list)
    table: list[BlockId] = field(default_factory=list)
    given: list[BlockId] = field(default_factory=list)
    is_pushed: bool = False


MakeOwnership = Callable[[Ledger, BlockPool, int], Ownership]


class World:
    """`step` does one random thing; every check is after every step. The same seed gives the same history."""

    def __init__(self, seed: int, make_ownership: MakeOwnership = Ownership) -> None:
        self.rng, self._make = random.Random(seed), make_ownership
        self.words = bytearray(ledger_bytes(SHARES))
        self.memory = [0] * sum(SHARES)
        self.written = 0
        self.workers = [self._born(number) for number in range(1, len(SHARES) + 1)]
        self.handoffs: list[Handoff] = []
        self.happened: Counter[str] = Counter()

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()
            self.check()
        self.come_to_rest()

    def step(self) -> None:
        moves = [self.compute, self.compute, self.share, self.finish, self.grant, self.grant, self.push, self.push]
        moves += [self.arrive, self.arrive, self.arrive, self.lose, self.cancel, self.settle, self.kill, self.restart]
        self.rng.choice(moves)()

    # ---- what may happen ----

    def compute(self) -> None:
        worker = self._any_alive()
        num_blocks = self.rng.randint(1, 3)
        if worker is None or not worker.pool.can_allocate(num_blocks):
            return
        table = worker.pool.allocate(num_blocks)
        # Few different hashes: sequences compute again what was given away.
        first = self.rng.randrange(4)
        hashes = [bytes([first, at]) * 16 for at in range(num_blocks)]
        for block_id, block_hash in zip(table, hashes, strict=True):
            worker.pool.publish(block_id, block_hash)
        worker.seqs.append(Seq(table, self._write(worker, table), hashes))

    def share(self) -> None:
        """A second sequence begins with the cached blocks of a first."""
        worker = self._any_alive()
        hashes = [bytes([self.rng.randrange(4), at]) * 16 for at in range(3)]
        found = worker.pool.match_prefix(hashes) if worker is not None else []
        if worker is None or not found:
            return
        worker.pool.acquire(found)
        numbers = {block_id: self.memory[block_id] for block_id in found}
        worker.seqs.append(Seq(found, numbers, hashes[: len(found)], num_found=self.rng.randint(0, len(found))))
        self.happened["shared"] += 1

    def finish(self) -> None:
        worker = self._any_alive()
        idle = [seq for seq in worker.seqs if not seq.handed] if worker is not None else []
        if worker is not None and idle:
            self._end(worker, self.rng.choice(idle))

    def grant(self) -> None:
        """A destination makes room for a sequence of a source."""
        source, destination = self._any_alive(), self._any_alive()
        if source is None or destination is None or source is destination:
            return
        idle = [seq for seq in source.seqs if not seq.handed]
        if not idle:
            return
        seq = self.rng.choice(idle)
        if not destination.pool.can_allocate(len(seq.table)):
            return
        seq.handed = True
        destination.generation += 1
        generation = destination.generation
        destination.granted[generation] = destination.pool.allocate(len(seq.table))
        self.handoffs.append(Handoff(source, destination, generation, seq))

    def push(self) -> None:
        """The source gives, whether or not the destination still lives, and wants it."""
        handoff = self._any_handoff(lambda h: not h.is_pushed and h.source.is_alive)
        if handoff is None:
            return
        source, seq = handoff.source, handoff.seq
        handoff.table = list(seq.table)
        handoff.numbers = [seq.numbers[block_id] for block_id in seq.table]
        handoff.given = source.ownership.choose(Candidates(seq.table, seq.hashes, seq.num_found))
        self.happened["given"] += len(handoff.given)
        self.happened["copied"] += len(seq.table) - len(handoff.given)
        # Now the source's pool has only the copied ones for this sequence.
        seq.table = [block_id for block_id in seq.table if block_id not in handoff.given]
        seq.numbers = {block_id: seq.numbers[block_id] for block_id in seq.table}
        give = source.ownership.give
        if self._lives_through(source, lambda: give(handoff.given, handoff.destination.number, handoff.generation)):
            handoff.is_pushed = True
        if not handoff.destination.is_alive:
            self.happened["given to the dead"] += 1

    def arrive(self) -> None:
        """The Push reaches a destination that lives; an ended hand-off is refused by its generation."""
        handoff = self._any_handoff(lambda h: h.is_pushed)
        if handoff is None:
            return
        self.handoffs.remove(handoff)
        destination, generation = handoff.destination, handoff.generation
        granted = destination.granted.get(generation)
        copies = any(block_id not in handoff.given for block_id in handoff.table)
        if not destination.is_alive or granted is None or (copies and not handoff.source.is_alive):
            self.happened["late"] += 1
            self._end_source(handoff)
            return
        ledger = destination.ledger
        stays = [is_given(ledger, block_id, destination.number, generation) for block_id in handoff.table]
        assert [b for b, stay in zip(handoff.table, stays, strict=True) if stay] == handoff.given, "a gift is gone"
        if self._lives_through(destination, lambda: self._take(handoff, granted, stays)):
            self.happened["taken"] += 1
        self._end_source(handoff)

    def _take(self, handoff: Handoff, granted: list[BlockId], stays: list[bool]) -> None:
        destination = handoff.destination
        pairs = list(zip(handoff.table, granted, stays, strict=True))
        for source_id, target_id, stay in pairs:
            if not stay:
                self.memory[target_id] = self.memory[source_id]
        paid = [target_id for _, target_id, stay in pairs if stay]
        destination.ownership.take(handoff.given, paid, handoff.source.number, handoff.generation)
        del destination.granted[handoff.generation]
        table = [source_id if stay else target_id for source_id, target_id, stay in pairs]
        destination.seqs.append(Seq(table, dict(zip(table, handoff.numbers, strict=True)), list(handoff.seq.hashes)))

    def lose(self) -> None:
        """The link breaks, or the Push is lost with it: both ends end the hand-off, each for itself."""
        handoff = self._any_handoff(lambda h: True)
        if handoff is not None and self.rng.random() < 0.5:
            self.handoffs.remove(handoff)
            self._end_source(handoff)
            self._end_destination(handoff)
            self.happened["lost"] += handoff.is_pushed

    def cancel(self) -> None:
        """The destination gives up; the source does not know yet, and gives later."""
        handoff = self._any_handoff(lambda h: True)
        if handoff is not None:
            self._end_destination(handoff)

    def settle(self) -> None:
        worker = self._any_alive()
        if worker is not None:
            self._lives_through(worker, lambda: self._settle(worker))

    def _settle(self, worker: Incarnation) -> None:
        done = worker.ownership.settle(worker.granted)
        self.happened["found"] += done.num_found
        self.happened["levelled"] += done.num_levelled

    def kill(self) -> None:
        worker = self._any_alive()
        if worker is not None and self.rng.random() < 0.12:
            self._die(worker)

    def restart(self) -> None:
        for at, worker in enumerate(self.workers):
            if not worker.is_alive and self.rng.random() < 0.7:
                self.workers[at] = self._born(worker.number)
                self.happened["restarted"] += 1

    # ---- what must hold ----

    def check(self) -> None:
        living = {worker.number: worker for worker in self.workers if worker.is_alive}
        check_conservation(Ledger(memoryview(self.words), SHARES), {n: w.pool for n, w in living.items()})
        for worker in living.values():
            worker.pool.check_invariants([*(seq.table for seq in worker.seqs), *worker.granted.values()])
            for seq in worker.seqs:
                for block_id in seq.table:
                    assert worker.ledger.entry(block_id).owner == worker.number, f"{worker.number} reads {block_id}"
                    assert self.memory[block_id] == seq.numbers[block_id], f"block {block_id} was written by another"

    def come_to_rest(self) -> None:
        """Everything ends, the dead return, everybody settles: no block is lost, and all are level again."""
        for handoff in list(self.handoffs):
            self._end_source(handoff)
            self._end_destination(handoff)
        self.handoffs = []
        self.workers = [worker if worker.is_alive else self._born(worker.number) for worker in self.workers]
        for worker in self.workers:
            for seq in list(worker.seqs):
                self._end(worker, seq)
            for generation in list(worker.granted):
                worker.pool.free(worker.granted.pop(generation))
        for _ in range(4):
            for worker in self.workers:
                worker.ledger.fuse = None
                worker.ownership.settle([])
                self.check()
        ledger = Ledger(memoryview(self.words), SHARES)
        check_conservation(ledger, {worker.number: worker.pool for worker in self.workers}, at_rest=True)
        assert ledger.counts() == list(SHARES)
        assert [worker.pool.num_free_blocks for worker in self.workers] == list(SHARES)

    # ---- inside ----

    def _born(self, number: int) -> Incarnation:
        ledger = FusedLedger(memoryview(self.words), SHARES)
        pool = first_pool(ledger, number, BLOCK_SIZE)
        return Incarnation(number, ledger, pool, self._make(ledger, pool, number))

    def _die(self, worker: Incarnation) -> None:
        """Its memory of things is gone. A Push that has left may still arrive."""
        worker.is_alive = False
        worker.seqs, worker.granted = [], {}
        self.happened["killed"] += 1

    def _lives_through(self, worker: Incarnation, act: Callable[[], object]) -> bool:
        worker.ledger.fuse = self.rng.randrange(4) if self.rng.random() < 0.3 else None
        try:
            act()
        except Killed:
            self._die(worker)
            self.happened["killed between two stores"] += 1
            return False
        return True

    def _any_alive(self) -> Incarnation | None:
        living = [worker for worker in self.workers if worker.is_alive]
        return self.rng.choice(living) if living else None

    def _any_handoff(self, fits: Callable[[Handoff], bool]) -> Handoff | None:
        found = [handoff for handoff in self.handoffs if fits(handoff)]
        return self.rng.choice(found) if found else None

    def _write(self, worker: Incarnation, table: list[BlockId]) -> Numbers:
        for block_id in table:
            assert worker.ledger.entry(block_id).owner == worker.number, f"{worker.number} writes {block_id}"
            self.written += 1
            self.memory[block_id] = self.written
        return {block_id: self.memory[block_id] for block_id in table}

    def _end(self, worker: Incarnation, seq: Seq) -> None:
        worker.seqs.remove(seq)
        worker.pool.free(reversed(seq.table))

    def _end_source(self, handoff: Handoff) -> None:
        if handoff.source.is_alive:
            self._end(handoff.source, handoff.seq)

    def _end_destination(self, handoff: Handoff) -> None:
        destination = handoff.destination
        granted = destination.granted.pop(handoff.generation, None) if destination.is_alive else None
        if granted is not None:
            destination.pool.free(granted)
