"""Both tables against each other over a network that loses, doubles, delays and reorders, with aborts and clock jumps.

Prompts are computed chunk by chunk and layer by layer, with failed steps; grants come in portions, also in the middle
of a step; links renew as time passes, until a side freezes. Blocks that are free hold poison: a write after the end of
a hand-off shows as damaged poison, a block sent after its end as a content that is not the ticket's.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from penstock.core.ids import BlockId, SeededIds, Ticket, WorkerKey, new_epoch, new_ticket
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.destination import DestinationTable
from penstock.kvtransfer.effects import (
    Advanced,
    BlocksArrived,
    MessageArrived,
    Offered,
    PeerLost,
    PeerUp,
    Received,
    ReceiveFailed,
    Revoke,
    Revoked,
    SendBlocks,
    SourceEnded,
)
from penstock.kvtransfer.incoming import Granting
from penstock.kvtransfer.source import HandoffPlan, PushSizes, SourceTable
from penstock.kvtransfer.transports.inproc import Delivery, InprocMesh, InprocNetwork, LinkEnd
from penstock.protocol.messages import Fingerprint, Grant, Peer, Phases, Role

NUM_LAYERS, LAYER_BYTES = 3, 8
FINGERPRINT = Fingerprint(
    model="m", weights="w", dtype="f4", num_layers=NUM_LAYERS, num_kv_heads=1, head_dim=1, block_size=4, layout="l"
)
POISON = b"\xdd"
NUM_BLOCKS = 12
LEASE_S = 10.0
PROOF, FORGED = b"p" * 16, b"f" * 16


class FaultyNetwork(InprocNetwork):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng, self.flying, self.faults = rng, list[Delivery](), True
        self.loss, self.doubling, self.reorder = rng.choice([0, 0.05, 0.3]), rng.choice([0, 0.2]), rng.random() < 0.5

    def send(self, delivery: Delivery) -> None:
        must_arrive = isinstance(delivery.item, LinkEnd) or not self.faults
        if not must_arrive and self.rng.random() < self.loss:
            return
        copies = 2 if not must_arrive and self.rng.random() < self.doubling else 1
        self.flying += [delivery] * copies

    def step(self) -> bool:
        if not (self.flying and self.rng.random() < 0.3) and super().step():
            return True
        if not self.flying:
            return False
        at = self.rng.randrange(len(self.flying)) if self.reorder and self.faults else 0
        self.deliver(self.flying.pop(at))
        return True


@dataclass
class Worker:
    key: WorkerKey
    role: Role
    mesh: InprocMesh
    memory: KVMemory
    free: list[BlockId]
    inbox: deque = field(default_factory=deque)
    deferred: deque = field(default_factory=deque)  # came within a step, and is no grant
    is_computing: bool = False
    blocks: dict[Ticket, list[BlockId]] = field(default_factory=dict)
    ends: Counter = field(default_factory=Counter)

    def allocate(self, count: int) -> list[BlockId]:
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def release(self, ticket: Ticket) -> None:
        for block in self.blocks.pop(ticket, []):
            self.memory.block(block)[:] = POISON * self.memory.block_bytes
            assert block not in self.free
            self.free.append(block)


@dataclass
class Room:
    """What a destination knows of an offer that it may grant, and has granted."""

    worker: Worker
    num_blocks: int
    reached: int
    held: int = -1  # until the first grant
    stop: int = 0


class World:
    """Two prefill and two decode workers; every action is drawn from the seed."""

    def __init__(self, seed: int) -> None:
        self.rng, self.ids, self.now = random.Random(seed), SeededIds(seed), 0.0
        self.network = FaultyNetwork(self.rng)
        self.sources = [self._worker("prefill", n) for n in range(2)]
        self.destinations = [self._worker("decode", n) for n in range(2)]
        self.source_tables = {w.key: SourceTable(LEASE_S, 2.0, self._sizes()) for w in self.sources}
        self.destination_tables = {
            w.key: DestinationTable(LEASE_S, expect_timeout_s=60, early_s=2) for w in self.destinations
        }
        self.content: dict[Ticket, list[bytes]] = {}
        self.tables: dict[Ticket, int] = {}  # blocks computed so far
        self.opened: list[Ticket] = []
        self.expected: list[Ticket] = []
        self.forged: set[Ticket] = set()
        self.forgery = 0.05
        self.rooms: dict[Ticket, Room] = {}
        self.received: list[Ticket] = []
        self.pushes: Counter[str] = Counter()
        peers = [Peer(worker_id=w.key.worker_id, epoch=w.key.epoch, role=w.role, kv_address="-") for w in self.workers]
        for worker in self.workers:
            worker.mesh.set_peers(peers)

    @property
    def workers(self) -> list[Worker]:
        return self.sources + self.destinations

    def _sizes(self) -> PushSizes:
        return PushSizes(NUM_LAYERS, self.rng.choice([1, 2, 4, 64]), self.rng.choice([1, 2, 1000]))

    def _worker(self, role: Role, number: int) -> Worker:
        key, memory = WorkerKey(f"{role}-{number}", new_epoch(self.ids)), KVMemory(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES)
        memory.buffer[:] = POISON * memory.nbytes
        inbox: deque = deque()
        mesh = InprocMesh(key, role, FINGERPRINT, memory, inbox.append, self.network)
        return Worker(key, role, mesh, memory, [BlockId(n) for n in range(NUM_BLOCKS)], inbox)

    # actions of the roles

    def start(self) -> None:
        source, destination = self.rng.choice(self.sources), self.rng.choice(self.destinations)
        num_blocks = self.rng.randint(1, 5)
        ticket = new_ticket(self.ids)
        steps = [
            lambda: self._expect(destination, ticket, source),
            lambda: self._open(source, ticket, destination, num_blocks),
        ]
        if self.rng.random() < 0.3:
            steps.reverse()
        if self.rng.random() < 0.1:
            steps.pop()
        for step in steps:
            step()

    def _expect(self, worker: Worker, ticket: Ticket, source: Worker) -> None:
        self.expected.append(ticket)
        self._apply(worker, self.destination_tables[worker.key].expect(ticket, source.key, self.now, PROOF))

    def _open(self, worker: Worker, ticket: Ticket, destination: Worker, num_blocks: int) -> None:
        if len(worker.free) < num_blocks:
            return
        self.opened.append(ticket)
        worker.blocks[ticket] = worker.allocate(num_blocks)
        self.tables[ticket] = 0
        self.content[ticket] = [self.rng.randbytes(worker.memory.block_bytes) for _ in range(num_blocks)]
        if self.rng.random() < self.forgery:
            self.forged.add(ticket)
        proof = FORGED if ticket in self.forged else PROOF
        num_tokens, reached = num_blocks * 4 - self.rng.randint(0, 3), self.rng.randint(0, num_blocks)
        plan = HandoffPlan(num_tokens, num_blocks, 4, reached, proof)
        self._apply(worker, self.source_tables[worker.key].open(ticket, destination.key, plan, self.now))

    def compute(self) -> None:
        """A step of one prefill worker: a chunk of each prompt, layer by layer; perhaps it fails and is run again."""
        worker = self.rng.choice(self.sources)
        chunks: dict[Ticket, tuple[int, int]] = {}
        for ticket, blocks in list(worker.blocks.items()):
            done = self.tables[ticket]
            chunks[ticket] = (done, min(len(blocks), done + self.rng.randint(0, 3)))
            self._apply(worker, self.source_tables[worker.key].reach(ticket, chunks[ticket][1], self.now))
        worker.is_computing = True
        self._compute_layers(worker, chunks, self.rng.choice([NUM_LAYERS, NUM_LAYERS, self.rng.randrange(NUM_LAYERS)]))
        worker.is_computing = False
        self._commit(worker, chunks)
        while worker.deferred:
            self._on_event(worker, worker.deferred.popleft())

    def _compute_layers(self, worker: Worker, chunks: dict[Ticket, tuple[int, int]], fails_at: int) -> None:
        table = self.source_tables[worker.key]
        for layer in range(fails_at):
            self._write(worker, chunks, layer)
            for ticket, (_, stop) in chunks.items():
                blocks = worker.blocks[ticket][:stop]
                self._apply(worker, table.layers_computed(ticket, blocks, layer + 1, self.now))
            self.deliver(self.rng.choice([0, 0, 3]))
        for layer in range(NUM_LAYERS if fails_at < NUM_LAYERS else 0):
            self._write(worker, chunks, layer)

    def _write(self, worker: Worker, chunks: dict[Ticket, tuple[int, int]], layer: int) -> None:
        part = slice(layer * LAYER_BYTES, (layer + 1) * LAYER_BYTES)
        for ticket, (done, stop) in chunks.items():
            for at in range(done, stop):
                worker.memory.block(worker.blocks[ticket][at])[part] = self.content[ticket][at][part]

    def _commit(self, worker: Worker, chunks: dict[Ticket, tuple[int, int]]) -> None:
        table = self.source_tables[worker.key]
        for ticket, (done, stop) in chunks.items():
            blocks, self.tables[ticket] = worker.blocks[ticket], stop
            if stop < len(blocks):
                self._apply(worker, table.blocks_ready(ticket, blocks[:stop], self.now))
            elif done < stop:
                self._apply(worker, table.seal(ticket, blocks, (), Phases(), self.now))

    def grant(self) -> None:
        for ticket, room in list(self.rooms.items()):
            if self.rng.random() < 0.7 and ticket in self.rooms:
                self._grant(ticket, room)

    def _grant(self, ticket: Ticket, room: Room) -> None:
        """As much as fits and prefill has reached, or less of it."""
        worker = room.worker
        held = room.held if room.held >= 0 else self.rng.randint(0, room.num_blocks)
        stop = self.rng.randint(room.stop, max(held, room.stop, room.reached))
        missing = max(held, stop) - len(worker.blocks.get(ticket, []))
        if len(worker.free) < missing or (room.held >= 0 and missing <= 0):
            return
        blocks = worker.blocks.setdefault(ticket, [])
        blocks += worker.allocate(missing)
        for at in range(held if room.held < 0 else 0):
            worker.memory.block(blocks[at])[:] = self.content[ticket][at]  # as if out of the prefix cache
        room.held, room.stop = held, max(held, stop)
        granting = Granting(held, room.stop, held, tuple(blocks))
        self._apply(worker, self.destination_tables[worker.key].grant(ticket, granting, self.now))

    def abort(self) -> None:
        worker = self.rng.choice(self.sources if self.rng.random() < 0.5 else self.destinations)
        table = self.table(worker)
        if not table.active():
            return
        ticket = self.rng.choice(table.active())
        if isinstance(table, SourceTable):
            self._apply(worker, table.fail(ticket, "cancelled", "abort", self.now))
        else:
            self._apply(worker, table.cancel(ticket, "cancelled", "abort", self.now))

    def disconnect(self) -> None:
        self.network.disconnect(self.rng.choice(self.sources).key, self.rng.choice(self.destinations).key)
        self.network.reconnect()

    def wait(self, seconds: float, renewing: bool = True) -> None:
        """Time passes; the links' own threads renew, unless everything freezes."""
        while seconds > 0:
            step_s = min(seconds, LEASE_S / 4) if renewing else seconds
            self.now, seconds = self.now + step_s, seconds - step_s
            for worker in self.workers if renewing else []:
                worker.mesh.renew()
            self.deliver(self.rng.choice([0, 5, 50]) if renewing else 0)
            for worker in self.workers:
                self._apply(worker, self.table(worker).tick(self.now))

    def table(self, worker: Worker) -> SourceTable | DestinationTable:
        return self.source_tables.get(worker.key) or self.destination_tables[worker.key]

    # plumbing

    def _apply(self, worker: Worker, effects: list) -> None:
        for effect in effects:
            match effect:
                case SourceEnded(ticket):
                    worker.ends[ticket] += 1
                    worker.release(ticket)
                case ReceiveFailed(ticket):
                    worker.ends[ticket] += 1
                    self.rooms.pop(ticket, None)
                    worker.release(ticket)
                case Received(ticket):
                    worker.ends[ticket] += 1
                    del self.rooms[ticket]
                    self.received.append(ticket)
                    self._check_content(worker, ticket)
                    worker.release(ticket)
                case Offered(ticket, _, num_blocks, _, reached):
                    self.rooms[ticket] = Room(worker, num_blocks, reached)
                case Advanced(ticket, reached):
                    self.rooms[ticket].reached = reached
                case Revoke(ticket=ticket):
                    self.rooms.pop(ticket, None)  # gets nothing more; its blocks come back later
                    worker.mesh.perform(effect)
                case _:
                    if isinstance(effect, SendBlocks):
                        self.pushes["whole" if effect.num_layers == NUM_LAYERS else "layers"] += 1
                    worker.mesh.perform(effect)
        self.check()

    def _check_content(self, worker: Worker, ticket: Ticket) -> None:
        found = [bytes(worker.memory.block(block)) for block in worker.blocks[ticket]]
        assert found == self.content[ticket]

    def deliver(self, limit: int) -> None:
        for _ in range(limit):
            if not self.network.step():
                break
            for worker in self.workers:
                while worker.inbox:
                    self._on_event(worker, worker.inbox.popleft())

    def _on_event(self, worker: Worker, event: object) -> None:
        table = self.table(worker)
        if worker.is_computing and not (isinstance(event, MessageArrived) and isinstance(event.message, Grant)):
            worker.deferred.append(event)
            return
        match event:
            case MessageArrived(peer, message):
                self._apply(worker, table.on_message(peer, message, self.now))
            case PeerLost(peer):
                self._apply(worker, table.peer_lost(peer, self.now))
            case BlocksArrived():
                self._apply(worker, self.destination_tables[worker.key].on_arrived(event, self.now))
            case Revoked():
                self._apply(worker, self.destination_tables[worker.key].on_revoked(event, self.now))
            case PeerUp():
                pass

    def check(self) -> None:
        for worker in self.workers:
            self.table(worker).check_invariants()
            held = [block for blocks in worker.blocks.values() for block in blocks]
            assert sorted(held + worker.free) == list(range(NUM_BLOCKS))
            poison = POISON * worker.memory.block_bytes
            assert all(worker.memory.block(block) == poison for block in worker.free), "written after it was free"

    def finish(self) -> None:
        """Run all timers out: with the rest of the work done, or in silence, where only the timers can end anything."""
        silent = self.rng.random() < 0.5
        self.network.faults, self.network.loss = silent, 1.0
        for _ in range(200):
            self.deliver(10_000)
            if not silent:
                self.compute()
                self.grant()
                for worker in self.workers:
                    worker.mesh.renew()
                self.deliver(10_000)
            deadlines = [self.table(w).next_deadline for w in self.workers]
            times = [time for time in deadlines if time is not None]
            if not times:
                return
            self.wait(max(1e-6, min(times) - self.now), renewing=False)
        raise AssertionError(f"still active: {[self.table(w).active() for w in self.workers]}")


def run_world(seed: int, loss: float | None = None) -> World:
    world = World(seed)
    if loss is not None:
        world.network.loss = loss
    actions = [world.start, world.compute, world.grant, lambda: world.deliver(world.rng.randint(1, 6))]
    rare = [
        world.abort,
        world.disconnect,
        lambda: world.wait(world.rng.choice([0.1, 1.0, 4.0, 15.0])),
        lambda: world.wait(world.rng.choice([1.0, 15.0]), renewing=False),
    ]
    for _ in range(200):
        world.rng.choice(rare if world.rng.random() < 0.15 else actions)()
    world.finish()
    return world


@pytest.mark.parametrize("first_seed", range(0, 300, 50))
def test_handoff_under_faults_ends_each_ticket_once_and_strands_no_block(first_seed: int) -> None:
    received, pushes = 0, Counter[str]()
    for seed in range(first_seed, first_seed + 50):
        world = run_world(seed)
        received += len(world.received)
        pushes += world.pushes
        assert world.forged.isdisjoint(world.received), f"seed {seed}"
        ended_at_source = sum((w.ends for w in world.sources), Counter())
        ended_at_destination = sum((w.ends for w in world.destinations), Counter())
        assert ended_at_source == Counter(world.opened), f"seed {seed}"
        assert ended_at_destination == Counter(world.expected), f"seed {seed}"
        for worker in world.workers:
            assert not world.table(worker).active(), f"seed {seed}"
            assert sorted(worker.free) == list(range(NUM_BLOCKS)), f"seed {seed}"
            assert not any(len(link.acceptances) for link in worker.mesh._links.values()), f"seed {seed}"
        assert all(table.num_early == 0 for table in world.destination_tables.values()), f"seed {seed}"
    assert received > 100
    assert min(pushes["whole"], pushes["layers"]) > 50


def test_handoff_without_faults_receives_everything() -> None:
    for seed in range(20):
        world = World(seed)
        world.network.faults, world.forgery = False, 0.0
        for _ in range(10):
            world.start()
            world.deliver(1000)
            for _ in range(4):
                world.compute()
                world.grant()
                world.deliver(1000)
        for _ in range(60):
            world.compute()
            world.grant()
            world.deliver(1000)
        assert sorted(world.received) == sorted(set(world.opened) & set(world.expected))
        assert len(world.received) > 5
        assert all(world.table(w).stale == 0 for w in world.workers)


def test_handoff_that_waits_long_lives_by_renewals_alone() -> None:
    """Ten leases without a block computed or granted: nothing ends while both sides say that it is alive."""
    for seed in range(10):
        world = World(seed)
        world.network.faults, world.forgery = False, 0.0
        for _ in range(5):
            world.start()
            world.deliver(1000)
        ends = sum((w.ends for w in world.workers), Counter())
        shared = set(world.opened) & set(world.expected)
        for _ in range(200):
            world.wait(LEASE_S / 20)
            world.deliver(1000)
        assert shared <= {ticket for w in world.sources for ticket in world.table(w).active()}
        assert shared <= {ticket for w in world.destinations for ticket in world.table(w).active()}
        assert not shared & ends.keys()


def test_handoff_ends_when_one_side_freezes() -> None:
    """The other half of the test above: the same wait without renewals."""
    world = World(3)
    world.network.faults, world.forgery = False, 0.0
    for _ in range(5):
        world.start()
        world.deliver(1000)
    shared = set(world.opened) & set(world.expected)
    assert shared
    world.wait(LEASE_S + 0.1, renewing=False)
    active = {ticket for w in world.workers for ticket in world.table(w).active()}
    assert not shared & active
