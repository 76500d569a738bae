"""Is every damaged block noticed, and no sound one suspected? The real sender and receiver over a wire that spoils.

python -m penstock.testing.corruption --faults 10000 --sound 100000
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.ids import BlockId, SeededIds, Ticket, WorkerKey, new_epoch, new_ticket
from ..engine.kv_memory import KVMemory
from ..kvtransfer.bulk import Bulk, Span
from ..kvtransfer.effects import AcceptBlocks, BlocksArrived, LinkEvent, SendBlocks
from ..kvtransfer.push_receiver import PushReceiver
from ..kvtransfer.push_sender import PushSender
from ..kvtransfer.transports.runs import paired
from ..protocol.messages import Done, Fingerprint, KvHello, Push

NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES, PER_PUSH = 32, 4, 96, 8
Spoil = Callable[[list[memoryview], random.Random], None]


class SpoilingBulk(Bulk):
    """Copies between two memories of this process, and then spoils what arrived when it is told to."""

    quarantine_s = 0.0
    in_parts = False

    def __init__(self, source: KVMemory, target: KVMemory, rng: random.Random) -> None:
        self._source, self._target, self._rng = source, target, rng
        self.spoil: Spoil | None = None

    def send(self, spans: Sequence[Span]) -> None:
        """The destination reads by itself."""

    def receive(self, source: Sequence[Span], target: Sequence[Span], wanted: Callable[[], bool]) -> None:
        for here, there, nbytes in paired(source, target, 1 << 20):
            self._target.region[there : there + nbytes] = self._source.region[here : here + nbytes]
        if self.spoil is not None:
            self.spoil([self._target.region[offset : offset + nbytes] for offset, nbytes in target], self._rng)

    def discard(self, source: Sequence[Span]) -> None:
        """Nothing is on its way."""

    def stop(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is held."""


def flip_a_bit(views: list[memoryview], rng: random.Random) -> None:
    view = rng.choice(views)
    view[rng.randrange(len(view))] ^= 1 << rng.randrange(8)


def exchange_two_blocks(views: list[memoryview], rng: random.Random) -> None:
    one, other = rng.sample(views, 2)
    kept = bytes(one)
    one[:], other[:] = bytes(other), kept


def exchange_two_pieces(views: list[memoryview], rng: random.Random) -> None:
    """Two equally long pieces of one block change places, as layers that were mixed up."""
    view = rng.choice(views)
    length = len(view) // 4
    first, second = rng.sample(range(4), 2)
    one, other = view[first * length : (first + 1) * length], view[second * length : (second + 1) * length]
    kept = bytes(one)
    one[:], other[:] = bytes(other), kept


def lose_the_end(views: list[memoryview], rng: random.Random) -> None:
    view = rng.choice(views)
    at = rng.randrange(len(view))
    view[at:] = bytes(len(view) - at)


SPOILERS: tuple[Spoil, ...] = (flip_a_bit, exchange_two_blocks, exchange_two_pieces, lose_the_end)


@dataclass
class Tally:
    """`faults` by kind, and how many of them were not noticed; sound blocks, and how many were suspected."""

    faults: Counter[str]
    missed: int = 0
    sound: int = 0
    suspected: int = 0


class Wire:
    """One direction of one link, driven by hand."""

    def __init__(self, seed: int) -> None:
        self._rng, self._ids = random.Random(seed), SeededIds(seed)
        self._source = KVMemory(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES)
        self._target = KVMemory(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES)
        self._bulk = SpoilingBulk(self._source, self._target, self._rng)
        self._peer = WorkerKey("prefill-0", new_epoch(self._ids))
        self._pushes: list[Push] = []
        self._events: list[LinkEvent] = []
        self._sender = PushSender(self._source, self._bulk, None, self._note)
        self._receiver = PushReceiver(
            self._peer, _hello(self._peer), self._target, self._bulk, None, self._events.append, lambda _: None
        )

    def close(self) -> None:
        self._source.close()
        self._target.close()

    def push(self, spoil: Spoil | None) -> int:
        """Move fresh random blocks, spoiled or not; how many were found corrupt."""
        rng, ticket = self._rng, new_ticket(self._ids)
        self._source.buffer[:] = rng.randbytes(self._source.nbytes)
        slots = tuple(BlockId(slot) for slot in rng.sample(range(NUM_BLOCKS), PER_PUSH))
        table = tuple(BlockId(block) for block in rng.sample(range(NUM_BLOCKS), PER_PUSH))
        accept = AcceptBlocks(self._peer, ticket, 1, 0, PER_PUSH, table, PER_PUSH * 4)
        self._receiver.acceptances.accept(accept)
        self._sender._send(SendBlocks(self._peer, ticket, 1, tuple(range(PER_PUSH)), slots, 0, NUM_LAYERS))
        self._bulk.spoil = spoil
        self._receiver._receive(self._pushes.pop())
        return self._found(ticket)

    def _note(self, message: Push | Done) -> None:
        if isinstance(message, Push):
            self._pushes.append(message)

    def _found(self, ticket: Ticket) -> int:
        (event,) = self._events
        self._events.clear()
        assert isinstance(event, BlocksArrived)
        assert event.ticket == ticket
        return len(event.corrupt)


def _hello(peer: WorkerKey) -> KvHello:
    fingerprint = Fingerprint(
        model="m", weights="w", dtype="f4", num_layers=NUM_LAYERS, num_kv_heads=1, head_dim=3, block_size=4, layout="l"
    )
    return KvHello(
        worker_id=peer.worker_id,
        epoch=peer.epoch,
        peer_epoch=None,
        fingerprint=fingerprint,
        transports=["shm"],
        host_id="",
        num_blocks=NUM_BLOCKS,
        block_bytes=NUM_LAYERS * LAYER_BYTES,
        nonce=bytes(16),
    )


def run(num_faults: int, num_sound: int, seed: int = 0, spoilers: Sequence[Spoil] = SPOILERS) -> Tally:
    """`num_faults` spoiled pushes, and `num_sound` blocks that are not."""
    tally, wire, rng = Tally(Counter()), Wire(seed), random.Random(seed)
    try:
        for _ in range(num_faults):
            spoil = rng.choice(list(spoilers))
            tally.faults[spoil.__name__] += 1
            tally.missed += not wire.push(spoil)
        while tally.sound < num_sound:
            tally.suspected += wire.push(None)
            tally.sound += PER_PUSH
    finally:
        wire.close()
    return tally


def main(argv: list[str] | None = None) -> int:
    """0 when every fault was noticed and no sound block was suspected."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m penstock.testing.corruption", description=description)
    parser.add_argument("--faults", type=int, default=10_000, help="spoiled pushes (default: 10000)")
    parser.add_argument("--sound", type=int, default=100_000, help="sound blocks (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    args = parser.parse_args(argv)
    tally = run(args.faults, args.sound, args.seed)
    kinds = ", ".join(f"{count} × {name.replace('_', ' ')}" for name, count in sorted(tally.faults.items()))
    sys.stdout.write(
        f"{tally.faults.total() - tally.missed} of {tally.faults.total()} faults noticed ({kinds}); "
        f"{tally.suspected} of {tally.sound} sound blocks suspected\n"
    )
    return int(bool(tally.missed or tally.suspected))


if __name__ == "__main__":
    raise SystemExit(main())
