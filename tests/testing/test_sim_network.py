"""The books of the simulated links: which offers still need a last word."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from penstock.core.ids import Ticket, WorkerKey
from penstock.kvtransfer.effects import LinkEvent, SendMessage
from penstock.kvtransfer.transports.inproc import InprocMesh
from penstock.protocol.messages import Failed, Offer, Peer, Role
from penstock.testing.chaos import ChaosProfile
from penstock.testing.clock import FakeClock
from penstock.testing.events import EventQueue
from penstock.testing.fake_engine import FakeEngine
from penstock.testing.sim_network import SimNetwork

PREFILL, DECODE = WorkerKey("prefill-0", "0" * 16), WorkerKey("decode-0", "d" * 16)
TICKET = Ticket(b"t" * 16)


class Pair:
    """A prefill and a decode worker's meshes on a simulated network, linked."""

    def __init__(self) -> None:
        self.events = EventQueue(FakeClock())
        self.network = SimNetwork(self.events, ChaosProfile(), random.Random(0), Counter())
        self.heard: list[LinkEvent] = []
        self.source, self.target = self.mesh(PREFILL, "prefill"), self.mesh(DECODE, "decode")
        self.link()

    def mesh(self, key: WorkerKey, role: Role) -> InprocMesh:
        engine = FakeEngine()
        return InprocMesh(key, role, engine.spec.fingerprint, engine.memory, self.heard.append, self.network)

    def offer(self) -> None:
        self.source.perform(SendMessage(DECODE, Offer(TICKET, 4, 1, 4, 1)))

    def link(self) -> None:
        self.target.set_peers([Peer(*PREFILL, "prefill", self.source.address)])

    def drop(self) -> None:
        """The target's end of the link is over; the source will hear of it."""
        self.target.set_peers([])

    def settle(self) -> None:
        while self.events.run_next():
            pass


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_offer_that_is_given_up_without_a_word_is_named_until_the_word_is_said(pair: Pair) -> None:
    pair.offer()
    assert pair.network.silent_ends(PREFILL, [TICKET]) == []
    assert pair.network.silent_ends(PREFILL, []) == [TICKET]
    pair.source.perform(SendMessage(DECODE, Failed(TICKET, "cancelled", "x")))
    assert pair.network.silent_ends(PREFILL, []) == []


def test_offer_on_a_dead_link_that_a_newer_one_replaces_needs_no_word(pair: Pair) -> None:
    pair.drop()
    pair.offer()
    pair.link()
    assert pair.network.silent_ends(PREFILL, []) == []


def test_offer_on_a_new_link_needs_its_word_whatever_is_still_heard_of_the_old_one(pair: Pair) -> None:
    pair.drop()
    pair.link()
    pair.offer()
    pair.settle()
    assert pair.network.silent_ends(PREFILL, []) == [TICKET]


def test_offer_needs_its_word_while_the_end_of_the_link_is_on_its_way(pair: Pair) -> None:
    pair.offer()
    pair.drop()
    assert pair.network.silent_ends(PREFILL, []) == [TICKET]
    pair.settle()
    assert pair.network.silent_ends(PREFILL, []) == []
