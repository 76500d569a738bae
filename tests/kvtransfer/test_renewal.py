"""Leases over sockets: the link's own thread renews what is alive, whatever the worker's loop does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from penstock.core.ids import BlockId, SecureIds, Ticket, new_ticket
from penstock.kvtransfer.destination import DestinationTable
from penstock.kvtransfer.effects import (
    Advanced,
    DestinationEffect,
    MessageArrived,
    Offered,
    PeerUp,
    Received,
    ReceiveFailed,
    Renewing,
    Revoked,
    SendBlocks,
    SourceEffect,
    SourceEnded,
)
from penstock.kvtransfer.incoming import Granting
from penstock.kvtransfer.source import HandoffPlan, PushSizes, SourceTable
from penstock.protocol.messages import Grant, HandoffMessage, KvPing, Offer, Renew

from .conftest import FINGERPRINT, TRANSPORTS, WAIT_S, Cluster, Handmade, Worker

LEASE_S, RENEW_S = 10.0, 0.02
PROOF = b"p" * 16


class Pair:
    """A hand-off that was offered and granted on a linked pair. The tables' time stands still but for `pass_time`."""

    def __init__(self, cluster: Cluster, transports: tuple[str, ...], **stalled: Callable[[], bool]) -> None:
        self.prefill, self.decode = (
            cluster.worker(role, role, transports, renew_s=RENEW_S, is_stalled=stalled.get(role, lambda: False))
            for role in ("prefill", "decode")
        )
        cluster.introduce()
        for worker in (self.prefill, self.decode):
            worker.wait_for(PeerUp)
        self.now, self.ticket = 0.0, new_ticket(SecureIds())
        self.source = SourceTable(LEASE_S, LEASE_S, PushSizes(FINGERPRINT.num_layers, 64, 1000))
        self.destination = DestinationTable(LEASE_S)
        self.ends: list[SourceEnded | ReceiveFailed] = []
        self.carry(self.destination.expect(self.ticket, self.prefill.key, self.now, PROOF))
        self.carry(self.source.open(self.ticket, self.decode.key, HandoffPlan(15, 4, 4, 1, PROOF), self.now))
        while not isinstance(self.hear(self.decode), Offer):
            continue
        while not isinstance(self.hear(self.prefill), Grant):
            continue

    def worker(self, role: str) -> Worker:
        return self.prefill if role == "prefill" else self.decode

    def other(self, worker: Worker) -> Worker:
        return self.decode if worker is self.prefill else self.prefill

    def table(self, worker: Worker) -> SourceTable | DestinationTable:
        return self.source if worker is self.prefill else self.destination

    def carry(self, effects: Sequence[SourceEffect | DestinationEffect]) -> None:
        for effect in effects:
            match effect:
                case SourceEnded() | ReceiveFailed():
                    self.ends.append(effect)
                case Offered(ticket=ticket):
                    self.carry(self.destination.grant(ticket, Granting(0, 1, 0, (BlockId(3),)), self.now))
                case Advanced() | Received():
                    raise AssertionError(effect)
                case _:
                    (self.decode if effect.peer == self.prefill.key else self.prefill).mesh.perform(effect)

    def hear(self, worker: Worker) -> HandoffMessage | Revoked:
        """This worker's loop handles the next event."""
        event = worker.events.get(timeout=WAIT_S)
        if isinstance(event, Revoked):
            self.carry(self.destination.on_revoked(event, self.now))
            return event
        assert isinstance(event, MessageArrived), event
        self.carry(self.table(worker).on_message(event.peer, event.message, self.now))
        return event.message

    def pass_time(self, seconds: float, worker: Worker) -> None:
        """This worker's loop looks at its timers later."""
        self.now += seconds
        self.carry(self.table(worker).tick(self.now))


@pytest.mark.parametrize("transports", TRANSPORTS)
@pytest.mark.parametrize("blocked", ["prefill", "decode"])
def test_lease_holds_while_a_loop_computes_for_many_leases(
    cluster: Cluster, transports: tuple[str, ...], blocked: str
) -> None:
    """A step may take longer than a lease: the worker lives, and its link says so. The blocked loop does nothing at
    all here: what the other one hears comes from the link's own thread."""
    pair = Pair(cluster, transports)
    waiting = pair.other(pair.worker(blocked))
    for _ in range(20):
        assert pair.hear(waiting) == Renew(tickets=[pair.ticket])
        pair.pass_time(0.9 * LEASE_S, waiting)
    assert pair.table(waiting).active() == [pair.ticket]
    while not pair.worker(blocked).events.empty():
        pair.hear(pair.worker(blocked))
    pair.pass_time(0.0, pair.worker(blocked))
    assert pair.ends == []
    assert pair.source.active() == pair.destination.active() == [pair.ticket]


@pytest.mark.parametrize("stalled", ["prefill", "decode"])
def test_lease_ends_when_the_loop_is_known_to_hang(cluster: Cluster, stalled: str) -> None:
    """Its link's thread lives on and pings, but nobody will ever do the work."""
    hangs, asked = threading.Event(), threading.Semaphore(0)

    def is_stalled() -> bool:
        asked.release()
        return hangs.is_set()

    pair = Pair(cluster, ("tcp",), **{stalled: is_stalled})
    waiting = pair.other(pair.worker(stalled))
    assert pair.hear(waiting) == Renew(tickets=[pair.ticket])
    hangs.set()
    sends_until(asked, 10)
    while not waiting.events.empty():  # said before it hung
        pair.hear(waiting)
    sends_until(asked, 10)
    assert waiting.events.empty()
    pair.pass_time(LEASE_S, waiting)
    if stalled == "prefill":
        assert isinstance(pair.hear(waiting), Revoked)
    assert [end.code for end in pair.ends] == ["lease_expired"]
    assert len(pair.prefill.mesh.linked()) == len(pair.decode.mesh.linked()) == 1


def sends_until(asked: threading.Semaphore, times: int) -> None:
    """The link's writer has come by so often."""
    while asked.acquire(blocking=False):
        continue
    for _ in range(times):
        assert asked.acquire(timeout=WAIT_S)


def test_renew_names_all_tickets_and_stops_with_the_last(cluster: Cluster) -> None:
    prefill = cluster.worker("prefill", "prefill-0", renew_s=RENEW_S)
    hand = Handmade.link(prefill, "decode-x")
    peer = prefill.mesh.linked()[0][0]
    tickets = [Ticket(bytes([n]) * 16) for n in range(3)]
    for ticket in tickets:
        prefill.mesh.perform(Renewing(peer, ticket, is_alive=True))
    while hand.read() != Renew(tickets=list(tickets)):
        continue
    for ticket in tickets:
        prefill.mesh.perform(Renewing(peer, ticket, is_alive=False))
    said = [hand.read_any() for _ in range(6)]
    assert said[-4:] == [KvPing()] * 4  # what was on its way before has come
    hand.sock.close()


def test_push_in_progress_does_not_hold_renewals_up(cluster: Cluster) -> None:
    """Bytes have a connection and threads of their own: a peer that takes no bytes still hears who is alive."""
    prefill = cluster.worker("prefill", "prefill-0", renew_s=RENEW_S)
    hand = Handmade.link(prefill, "decode-x", transports=["shm"])
    peer = prefill.mesh.linked()[0][0]
    prefill.mesh.perform(Renewing(peer, Ticket(b"t" * 16), is_alive=True))
    for ordinal in range(50):
        blocks = (BlockId(ordinal % 32),)
        prefill.mesh.perform(SendBlocks(peer, Ticket(b"t" * 16), 1, (ordinal,), blocks, 0, FINGERPRINT.num_layers))
    while not isinstance(hand.read(), Renew):
        continue
    hand.sock.close()
