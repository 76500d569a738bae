"""I8 for the two hand-off tables alone: random histories against a model that is a plain dict of last words.

In the whole cluster a dead peer is mostly noticed by its link; here nothing but the lease ends a hand-off.
"""

from __future__ import annotations

import random

from ..core.ids import BlockId, Ticket, WorkerKey
from ..kvtransfer.destination import DestinationTable
from ..kvtransfer.effects import Revoke
from ..kvtransfer.incoming import Granting
from ..kvtransfer.source import HandoffPlan, PushSizes, SourceTable
from ..protocol.messages import Offer, Renew
from .clock import FakeClock
from .invariants import InvariantBroken

LEASE_S = 2.0
NUM_HISTORIES, NUM_STEPS = 40, 60
PEERS = [WorkerKey(f"peer-{i}", f"{i:016x}") for i in range(3)]


def check_leases() -> None:
    """Raises InvariantBroken when a ticket outlives its lease by one look at the timers, on either side."""
    for seed in range(NUM_HISTORIES):
        _play_source(random.Random(seed))
        _play_destination(random.Random(seed))


def _play_source(rng: random.Random) -> None:
    clock, table = FakeClock(0.0), SourceTable(LEASE_S, LEASE_S, PushSizes(2, 6, 1))
    heard: dict[Ticket, tuple[WorkerKey, float]] = {}
    for _ in range(NUM_STEPS):
        clock.advance(rng.random() * LEASE_S / 4)
        now, peer = clock.now(), rng.choice(PEERS)
        if rng.random() < 0.5:
            ticket = Ticket(rng.randbytes(16))
            table.open(ticket, peer, HandoffPlan(8, 2, 4, 1), now)
            heard[ticket] = (peer, now)
        else:
            _renew(table, heard, peer, rng, now)
        table.tick(now)
        _compare("source", table.active(), heard, now)


def _play_destination(rng: random.Random) -> None:
    clock, table = FakeClock(0.0), DestinationTable(LEASE_S)
    heard: dict[Ticket, tuple[WorkerKey, float]] = {}
    for number in range(NUM_STEPS):
        clock.advance(rng.random() * LEASE_S / 4)
        now, peer = clock.now(), rng.choice(PEERS)
        if rng.random() < 0.5:
            ticket = Ticket(rng.randbytes(16))
            table.expect(ticket, peer, now)
            table.on_message(peer, Offer(ticket=ticket, num_tokens=8, num_blocks=2, block_size=4, reached=2), now)
            if rng.random() < 0.7:
                table.grant(ticket, Granting(0, 2, 0, (BlockId(2 * number), BlockId(2 * number + 1))), now)
            heard[ticket] = (peer, now)
        else:
            _renew(table, heard, peer, rng, now)
        effects = table.tick(now)
        # One that has been granted lives on until its link confirms, but it has been given up.
        for effect in effects:
            if isinstance(effect, Revoke):
                del heard[effect.ticket]
        _compare("destination", [t for t in table.active() if t in heard], heard, now)


def _renew(
    table: SourceTable | DestinationTable,
    heard: dict[Ticket, tuple[WorkerKey, float]],
    peer: WorkerKey,
    rng: random.Random,
    now: float,
) -> None:
    """`peer` names some of the tickets that it shares with us."""
    active = set(table.active())
    mine = [ticket for ticket, (owner, _) in heard.items() if owner == peer and ticket in active]
    named = [ticket for ticket in mine if rng.random() < 0.5]
    table.on_message(peer, Renew(tickets=list(named)), now)
    heard.update(dict.fromkeys(named, (peer, now)))


def _compare(side: str, active: list[Ticket], heard: dict[Ticket, tuple[WorkerKey, float]], now: float) -> None:
    for ticket in active:
        silent_s = now - heard[ticket][1]
        if silent_s >= LEASE_S + 1e-9:
            raise InvariantBroken(f"I8 {side}: {ticket.hex()[:8]} lives {silent_s:.2f} s after its peer's last word")
    for ticket in [t for t, (_, at) in heard.items() if now - at < LEASE_S - 1e-9 and t not in set(active)]:
        raise InvariantBroken(f"I8 {side}: {ticket.hex()[:8]} is ended within its lease")
