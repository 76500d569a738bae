"""Hand-off links between simulated workers:

the in-process meshes, on virtual time, with faults and with checks of every write.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from ..core.ids import Ticket, WorkerKey
from ..kvtransfer.effects import LinkEvent, Revoked
from ..kvtransfer.transports.inproc import Delivery, InprocMesh, InprocNetwork, LinkEnd
from ..protocol import codec
from ..protocol.messages import Ack, Cancel, Failed, HandoffMessage, Offer, Push
from .chaos import ChaosProfile, Wire
from .events import EventQueue
from .story import tell
from .strangers import strange_handoff_message
from .tap import Crossing, Tap

RECONNECT_S = 0.1
Pair = tuple[WorkerKey, WorkerKey]
OfferedOn = tuple[WorkerKey, WorkerKey, int]  # (source, destination, number of the link)
CopyCheck = Callable[[InprocMesh, InprocMesh, Push, int, int], None]
GiftCheck = Callable[[InprocMesh, Push, int, int], None]
LeaveCheck = Callable[[WorkerKey, HandoffMessage, int], None]


class SimNetwork(InprocNetwork):
    """Plans each delivery on the event queue.

    `check_copy(source, target, push, slot, block)` runs before a block is written, `check_gift(target, push, ordinal,
    block)` when one that was given is found in its place, `check_leaving(source, message,
    num_layers)` before a message goes on its way.
    """

    def __init__(self, events: EventQueue, profile: ChaosProfile, rng: random.Random, faults: Counter[str]) -> None:
        super().__init__()
        self._events, self._profile, self._rng, self._faults = events, profile, rng, faults
        self._wires: dict[Pair, Wire] = {}
        self._open_offers: dict[OfferedOn, set[bytes]] = {}  # offered there, and no last word yet
        self.is_calm = False
        self.tap = Tap()
        self.check_copy: CopyCheck | None = None
        self.check_gift: GiftCheck | None = None
        self.check_leaving: LeaveCheck | None = None
        self.trace: Callable[[str], None] | None = None

    def calm(self) -> None:
        """No more faults from now on."""
        self.is_calm = True
        for wire in self._wires.values():
            wire.is_calm = True

    # ---- carrying ----

    def send(self, delivery: Delivery) -> None:
        item = delivery.item
        if self.trace is not None:
            self.trace(f"{tell(delivery.source)} → {tell(delivery.target)}  {tell(item)}")
        if isinstance(item, LinkEnd):
            self._events.after(self._profile.delay_s, lambda: self.deliver(delivery))
            return
        self._note_sent(delivery)
        if self.check_leaving is not None:
            self.check_leaving(delivery.source, item, self._num_layers(delivery.source))
        if not self.is_calm and self._rng.random() < self._profile.cut:
            self._faults["cut link"] += 1
            self._events.after(0.0, lambda: self.cut(delivery.source, delivery.target, RECONNECT_S))
            return
        frame = codec.handoff.encode(item)
        wire, tap = self._wire(delivery.source, delivery.target), self.tap
        crossing = Crossing(delivery.source, delivery.target, item, self._events.clock.now())

        def arrive(frame: bytes) -> None:
            tap.arrives(crossing, frame, lambda frame: self._arrive(delivery, frame))

        tap.leaves(crossing, frame, lambda frame: wire.carry(type(item).__name__, lambda: arrive(frame)))
        if not self.is_calm and self._profile.unknown and self._rng.random() < self._profile.unknown:
            self._send_strange(delivery)

    def _send_strange(self, delivery: Delivery) -> None:
        item = strange_handoff_message(self._rng, self._num_layers(delivery.target))
        self._faults[f"unknown {type(item).__name__}"] += 1
        strange = Delivery(delivery.source, delivery.target, delivery.link, item)
        self._events.after(self._profile.delay_s, lambda: self.deliver(strange))

    def _num_layers(self, key: WorkerKey) -> int:
        mesh = self.find(key)
        return mesh.memory.num_layers if mesh is not None else 1

    def _arrive(self, delivery: Delivery, frame: bytes) -> None:
        item = codec.handoff.decode(frame)
        if isinstance(item, Ack | Cancel):
            offered_on = (delivery.target, delivery.source, delivery.link)
            self._open_offers.get(offered_on, set()).discard(item.ticket)
        self.deliver(Delivery(delivery.source, delivery.target, delivery.link, item))

    def post(self, mesh: InprocMesh, event: LinkEvent) -> None:
        # a copy in progress goes on for a moment
        delay_s = self._profile.delay_s if isinstance(event, Revoked) else 0.0
        self._events.after(delay_s, lambda: mesh.report(event))

    def cut(self, one: WorkerKey, other: WorkerKey, seconds: float) -> None:
        """Break the link between two workers; it is made anew after `seconds`."""
        self.disconnect(one, other, "link cut")
        self._events.after(seconds, self.reconnect)

    def _wire(self, source: WorkerKey, target: WorkerKey) -> Wire:
        wire = self._wires.get((source, target))
        if wire is None:
            wire = self._wires[source, target] = Wire(self._events, self._profile, self._rng, self._faults)
            wire.is_calm = self.is_calm
        return wire

    # ---- copying ----

    def stay(self, target: InprocMesh, push: Push, ordinal: int, block: int) -> None:
        self._faults["given block"] += 1
        if self.check_gift is not None:
            self.check_gift(target, push, ordinal, block)

    def move(self, source: InprocMesh, target: InprocMesh, push: Push, slot: int, block: int) -> None:
        if self.check_copy is not None:
            self.check_copy(source, target, push, slot, block)
        super().move(source, target, push, slot, block)
        if not self.is_calm and self._rng.random() < self._profile.corrupt:
            self._faults["corrupt block"] += 1
            view = target.memory.block(block, push.first_layer, push.num_layers)
            view[self._rng.randrange(len(view))] ^= 1 << self._rng.randrange(8)
        view = target.memory.block(block, push.first_layer, push.num_layers)
        self.tap.copied(push, source.key, target.key, view)

    # ---- who was told what ----

    def _note_sent(self, delivery: Delivery) -> None:
        offers = self._open_offers.setdefault((delivery.source, delivery.target, delivery.link), set())
        if isinstance(delivery.item, Offer):
            offers.add(delivery.item.ticket)
        elif isinstance(delivery.item, Failed):
            offers.discard(delivery.item.ticket)

    def silent_ends(self, source: WorkerKey, active: list[Ticket]) -> list[bytes]:
        """Tickets that `source` has given up without a word to their destination.

        What was offered on a link ends with that link, at each end by itself, whatever link follows it.
        """
        for offered_on in [key for key in self._open_offers if key[0] == source and not self._is_up(*key)]:
            del self._open_offers[offered_on]
        offered = [tickets for (owner, _, _), tickets in self._open_offers.items() if tickets and owner == source]
        return sorted(set().union(*offered) - set(active)) if offered else []

    def _is_up(self, source: WorkerKey, target: WorkerKey, link: int) -> bool:
        mesh = self.find(source)
        return mesh is not None and mesh.link_to(target) == link
