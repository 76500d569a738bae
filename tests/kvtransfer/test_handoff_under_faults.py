"""Both tables against each other over a network that loses, doubles, delays and reorders, with aborts and clock jumps.

Blocks that are free hold poison: a write after the end of a hand-off shows as damaged poison, a block sent after its
end as a content that is not the ticket's.
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
    BlocksArrived,
    MessageArrived,
    Offered,
    PeerLost,
    PeerUp,
    Received,
    ReceiveFailed,
    Revoked,
    SourceEnded,
)
from penstock.kvtransfer.source import SourceTable
from penstock.kvtransfer.transports.inproc import Delivery, InprocMesh, InprocNetwork, LinkEnd
from penstock.protocol.messages import Fingerprint, Peer, Phases, Role

FINGERPRINT = Fingerprint(
    model="m", weights="w", dtype="f4", num_layers=2, num_kv_heads=1, head_dim=1, block_size=4, layout="l"
)
POISON = b"\xdd"
NUM_BLOCKS = 12
LEASE_S = 10.0


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


class World:
    """Two prefill and two decode workers; every action is drawn from the seed."""

    def __init__(self, seed: int) -> None:
        self.rng, self.ids, self.now = random.Random(seed), SeededIds(seed), 0.0
        self.network = FaultyNetwork(self.rng)
        self.sources = [self._worker("prefill", n) for n in range(2)]
        self.destinations = [self._worker("decode", n) for n in range(2)]
        self.source_tables = {w.key: SourceTable(LEASE_S, 2.0, self.rng.choice([1, 2, 64])) for w in self.sources}
        self.destination_tables = {
            w.key: DestinationTable(LEASE_S, expect_timeout_s=60, early_s=2) for w in self.destinations
        }
        self.content: dict[Ticket, list[bytes]] = {}
        self.tables: dict[Ticket, int] = {}  # blocks computed so far
        self.tokens: dict[Ticket, int] = {}
        self.opened: list[Ticket] = []
        self.expected: list[Ticket] = []
        self.offers: dict[Ticket, tuple[Worker, int]] = {}
        self.received = 0
        peers = [Peer(worker_id=w.key.worker_id, epoch=w.key.epoch, role=w.role, kv_address="-") for w in self.workers]
        for worker in self.workers:
            worker.mesh.set_peers(peers)

    @property
    def workers(self) -> list[Worker]:
        return self.sources + self.destinations

    def _worker(self, role: Role, number: int) -> Worker:
        key, memory = WorkerKey(f"{role}-{number}", new_epoch(self.ids)), KVMemory(NUM_BLOCKS, 2, 16)
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
        self._apply(worker, self.destination_tables[worker.key].expect(ticket, source.key, self.now))

    def _open(self, worker: Worker, ticket: Ticket, destination: Worker, num_blocks: int) -> None:
        if len(worker.free) < num_blocks:
            return
        self.opened.append(ticket)
        worker.blocks[ticket] = worker.allocate(num_blocks)
        self.tables[ticket], self.tokens[ticket] = 0, num_blocks * 4 - self.rng.randint(0, 3)
        self.content[ticket] = [self.rng.randbytes(worker.memory.block_bytes) for _ in range(num_blocks)]
        table = self.source_tables[worker.key]
        self._apply(worker, table.open(ticket, destination.key, self.tokens[ticket], num_blocks, self.now))

    def compute(self) -> None:
        worker = self.rng.choice(self.sources)
        for ticket, blocks in list(worker.blocks.items()):
            done, table = self.tables[ticket], self.source_tables[worker.key]
            stop = min(len(blocks), done + self.rng.randint(1, 3))
            for at in range(done, stop):
                worker.memory.block(blocks[at])[:] = self.content[ticket][at]
            self.tables[ticket] = stop
            if stop < len(blocks):
                self._apply(worker, table.blocks_ready(ticket, blocks[:stop], self.now))
            elif done < stop:
                effects = table.seal(ticket, blocks, self.tokens[ticket], (), Phases(), self.now)
                self._apply(worker, effects)

    def grant(self) -> None:
        for ticket, (worker, num_blocks) in list(self.offers.items()):
            held = self.rng.randint(0, num_blocks)
            if self.rng.random() < 0.3 or len(worker.free) < num_blocks - held:
                continue
            del self.offers[ticket]
            blocks = worker.allocate(num_blocks - held)
            worker.blocks[ticket] = blocks
            self._apply(worker, self.destination_tables[worker.key].grant(ticket, held, blocks, self.now))

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

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for worker in self.workers:
            self._apply(worker, self.table(worker).tick(self.now))

    def table(self, worker: Worker) -> SourceTable | DestinationTable:
        return self.source_tables.get(worker.key) or self.destination_tables[worker.key]

    # plumbing

    def _apply(self, worker: Worker, effects: list) -> None:
        for effect in effects:
            match effect:
                case SourceEnded(ticket) | ReceiveFailed(ticket):
                    worker.ends[ticket] += 1
                    self.offers.pop(ticket, None)
                    worker.release(ticket)
                case Received(ticket, done):
                    worker.ends[ticket] += 1
                    self.received += 1
                    self._check_content(worker, ticket, done.num_blocks)
                    worker.release(ticket)
                case Offered(ticket, _, num_blocks):
                    self.offers[ticket] = (worker, num_blocks)
                case _:
                    worker.mesh.perform(effect)
        self.check()

    def _check_content(self, worker: Worker, ticket: Ticket, count: int) -> None:
        found = [bytes(worker.memory.block(block)) for block in worker.blocks[ticket]]
        assert found == self.content[ticket][len(self.content[ticket]) - count :]

    def deliver(self, limit: int) -> None:
        for _ in range(limit):
            if not self.network.step():
                break
            for worker in self.workers:
                while worker.inbox:
                    self._on_event(worker, worker.inbox.popleft())

    def _on_event(self, worker: Worker, event: object) -> None:
        table = self.table(worker)
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
            deadlines = [self.table(w).next_deadline for w in self.workers]
            times = [time for time in deadlines if time is not None]
            if not times:
                return
            self.wait(max(0.0, min(times) - self.now))
        raise AssertionError(f"still active: {[self.table(w).active() for w in self.workers]}")


def run_world(seed: int, loss: float | None = None) -> World:
    world = World(seed)
    if loss is not None:
        world.network.loss = loss
    actions = [world.start, world.compute, world.grant, lambda: world.deliver(world.rng.randint(1, 6))]
    rare = [world.abort, world.disconnect, lambda: world.wait(world.rng.choice([0.1, 1.0, 4.0, 15.0]))]
    for _ in range(200):
        world.rng.choice(rare if world.rng.random() < 0.15 else actions)()
    world.finish()
    return world


@pytest.mark.parametrize("first_seed", range(0, 300, 50))
def test_handoff_under_faults_ends_each_ticket_once_and_strands_no_block(first_seed: int) -> None:
    received = 0
    for seed in range(first_seed, first_seed + 50):
        world = run_world(seed)
        received += world.received
        ended_at_source = sum((w.ends for w in world.sources), Counter())
        ended_at_destination = sum((w.ends for w in world.destinations), Counter())
        assert ended_at_source == Counter(world.opened), f"seed {seed}"
        assert ended_at_destination == Counter(world.expected), f"seed {seed}"
        for worker in world.workers:
            assert not world.table(worker).active(), f"seed {seed}"
            assert sorted(worker.free) == list(range(NUM_BLOCKS)), f"seed {seed}"
            assert not any(len(link.acceptances) for link in worker.mesh._links.values()), f"seed {seed}"
        assert all(table.num_early == 0 for table in world.destination_tables.values()), f"seed {seed}"
    assert received > 0


def test_handoff_without_faults_receives_everything() -> None:
    for seed in range(20):
        world = World(seed)
        world.network.faults = False
        for _ in range(10):
            world.start()
            world.deliver(1000)
            for _ in range(4):
                world.compute()
                world.grant()
                world.deliver(1000)
        for _ in range(40):
            world.compute()
            world.grant()
            world.deliver(1000)
        assert world.received == len(set(world.opened) & set(world.expected))
        assert world.received > 5
        assert all(world.table(w).stale == 0 for w in world.workers)
