"""Links between workers of one process, without sockets, threads or time: for tests and for the simulation.

Everything a mesh does to another waits in the network's queue as a `Delivery`: one for each control message and each
push. A subclass overrides `send` (lose, double, hold back) and may call `deliver` for any delivery at any later moment,
in any order; only a `LinkEnd` has to arrive in the end. As with shared memory the bytes are copied when the push is
delivered, and checked against digests taken when it was sent.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ...core.errors import ProtocolError
from ...core.ids import Ticket, WorkerKey
from ...engine.kv_memory import KVMemory
from ...engine.ledger import Ledger
from ...protocol.messages import Done, Fingerprint, HandoffMessage, Peer, Push, Renew, Role
from ..acceptance import Acceptances, check_push
from ..digest import digests
from ..effects import (
    AcceptBlocks,
    LinkEffect,
    LinkEvent,
    MessageArrived,
    PeerLost,
    PeerUp,
    Renewing,
    Revoke,
    Revoked,
    SendBlocks,
    SendMessage,
    Withdraw,
)
from ..link import Mesh, OnEvent
from ..linking import dials
from ..ownership import TRANSPORT as OWNER
from ..ownership import is_given
from ..push_receiver import arrived_event, corrupt_ordinals, given_blocks
from ..push_sender import layers_span, push_of
from ..vouching import Vouchers

TRANSPORT = "inproc"


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """Travels like a message, so that a loss can be noticed late."""

    reason: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """One thing on its way. It arrives only while the link with number `link` is up at the target."""

    source: WorkerKey
    target: WorkerKey
    link: int
    item: HandoffMessage | LinkEnd


@dataclass(slots=True)
class _InprocLink:
    number: int
    acceptances: Acceptances
    transport: str
    vouchers: Vouchers = field(default_factory=Vouchers)
    alive: dict[Ticket, None] = field(default_factory=dict)  # named to the peer by every renewal


class InprocNetwork:
    """Connects the meshes of one process. Nothing happens but in `step`; the order is the order of sending."""

    def __init__(self) -> None:
        self._meshes: dict[WorkerKey, InprocMesh] = {}
        self._queue: deque[Delivery] = deque()
        self._local: deque[tuple[InprocMesh, LinkEvent]] = deque()
        self._num_links = 0

    # ---- for subclasses ----

    def send(self, delivery: Delivery) -> None:
        """Take one thing on its way; the override point for faults."""
        self._queue.append(delivery)

    def deliver(self, delivery: Delivery) -> None:
        """Let it arrive now. Nothing happens when the target or its end of that link is gone."""
        target = self._meshes.get(delivery.target)
        if target is not None:
            target.receive(delivery)

    def move(self, source: InprocMesh, target: InprocMesh, push: Push, slot: int, block: int) -> None:
        """Copy what `push` says of one block; a place to look on, or to spoil the bytes."""
        layers = (push.first_layer, push.num_layers)
        target.memory.block(block, *layers)[:] = source.memory.block(slot, *layers)

    def stay(self, target: InprocMesh, push: Push, ordinal: int, block: int) -> None:
        """A block that `push` gives away is where it belongs; a place to look on."""

    # ---- running ----

    def step(self) -> bool:
        """Report one event, or deliver one thing; False when there was nothing to do."""
        if self._local:
            mesh, event = self._local.popleft()
            mesh.report(event)
            return True
        if self._queue:
            self.deliver(self._queue.popleft())
            return True
        return False

    def deliver_all(self) -> int:
        """Step until nothing is left, what events cause included; how many steps that took."""
        steps = 0
        while self.step():
            steps += 1
        return steps

    # ---- faults ----

    def kill(self, key: WorkerKey) -> None:
        """The worker is gone at once; its peers hear of it."""
        mesh = self._meshes.pop(key, None)
        if mesh is not None:
            mesh.die("the peer died")

    def disconnect(self, one: WorkerKey, other: WorkerKey, reason: str = "the connection broke") -> None:
        """Break one link: both ends hear of it. `set_peers` or `reconnect` links them anew."""
        for source, target in ((one, other), (other, one)):
            mesh = self._meshes.get(target)
            if mesh is not None:
                mesh.lose(source, reason)

    def reconnect(self) -> None:
        """Link all pairs that should be and are not."""
        for mesh in list(self._meshes.values()):
            mesh.dial()

    # ---- for meshes ----

    def add(self, mesh: InprocMesh) -> None:
        self._meshes[mesh.key] = mesh

    def remove(self, mesh: InprocMesh) -> None:
        self._meshes.pop(mesh.key, None)

    def find(self, key: WorkerKey) -> InprocMesh | None:
        return self._meshes.get(key)

    def post(self, mesh: InprocMesh, event: LinkEvent) -> None:
        """An event that a mesh reports to its own worker: never lost, in order, not necessarily at once."""
        self._local.append((mesh, event))

    def next_link(self) -> int:
        self._num_links += 1
        return self._num_links


@dataclass(slots=True)
class InprocMesh(Mesh):
    """A `Mesh` on an `InprocNetwork`. Listed workers on the network with an equal fingerprint are linked at once.

    `ledger`, `owner`: this worker is that owner of a memory it shares with others, and has only links to such.
    """

    key: WorkerKey
    role: Role
    fingerprint: Fingerprint
    memory: KVMemory
    on_event: OnEvent
    network: InprocNetwork
    ledger: Ledger | None = None
    owner: int = 0
    _links: dict[WorkerKey, _InprocLink] = field(default_factory=dict)
    _peers: list[Peer] = field(default_factory=list)
    _closed: bool = False

    def __post_init__(self) -> None:
        self.network.add(self)

    # ---- Mesh ----

    @property
    def address(self) -> str:
        return f"inproc:{self.key.worker_id}"

    @property
    def transports(self) -> list[str]:
        return [self._transport]

    def set_peers(self, peers: list[Peer]) -> None:
        gone = {_key(peer) for peer in self._peers} - {_key(peer) for peer in peers}
        self._peers = list(peers)
        for key in sorted(gone & self._links.keys()):
            self._drop(key, "no longer listed by the router")
        self.dial()

    def set_role(self, role: Role) -> None:
        self.role = role

    def perform(self, effect: LinkEffect) -> None:
        link = self._links.get(effect.peer)
        if link is None:
            return
        match effect:
            case SendMessage(message=Done() as done):
                self._send(effect.peer, link, link.vouchers.complete(done))
            case SendMessage():
                self._send(effect.peer, link, effect.message)
            case SendBlocks():
                push = self._push(effect)
                link.vouchers.note(push)
                self._send(effect.peer, link, push)
            case Withdraw():
                link.vouchers.forget(effect.ticket)
            case Renewing(ticket=ticket, is_alive=True):
                link.alive[ticket] = None
            case Renewing(ticket=ticket):
                link.alive.pop(ticket, None)
            case AcceptBlocks():
                link.acceptances.accept(effect)
            case Revoke():
                self.network.post(self, Revoked(effect.peer, effect.ticket))

    def renew(self) -> None:
        """What a link's own thread does every third of a lease: name the tickets that are alive here."""
        for peer, link in list(self._links.items()):
            if link.alive:
                self._send(peer, link, Renew(tickets=list(link.alive)))

    def linked(self) -> list[tuple[WorkerKey, str]]:
        return [(key, link.transport) for key, link in sorted(self._links.items(), key=lambda item: item[0])]

    def link_to(self, peer: WorkerKey) -> int | None:
        """The number of the link to `peer` whose end here is up."""
        link = self._links.get(peer)
        return link.number if link is not None else None

    def drop_links(self) -> None:
        for peer in list(self._links):
            self.network.disconnect(self.key, peer)

    def close(self) -> None:
        self.network.remove(self)
        self.die("this worker ended")

    @property
    def refused_pushes(self) -> int:
        return sum(link.acceptances.refused for link in self._links.values())

    # ---- for the network ----

    def dial(self) -> None:
        """Link to the listed peers that are ours to dial and not linked."""
        for peer in self._peers:
            other = self.network.find(_key(peer))
            wanted = dials(self.role, self.key.worker_id, peer) and _key(peer) not in self._links
            if other is None or not wanted or self.fingerprint != other.fingerprint:
                continue
            if self.ledger is not other.ledger:
                continue
            number = self.network.next_link()
            other.attach(self.key, number)
            self.attach(other.key, number)

    def attach(self, peer: WorkerKey, number: int) -> None:
        """A new link begins; what is left of an older one ends first."""
        if peer in self._links:
            self.lose(peer, "the peer has opened a newer link")
        self._links[peer] = _InprocLink(number, Acceptances(self.memory.num_layers), self._transport)
        self.network.post(self, PeerUp(peer, self._transport))

    def lose(self, peer: WorkerKey, reason: str) -> None:
        """This end of the link is over."""
        if self._links.pop(peer, None) is not None:
            self.network.post(self, PeerLost(peer, reason))

    def die(self, reason: str) -> None:
        """No event is reported here any more; the peers are told."""
        self._closed = True
        for peer in list(self._links):
            self._drop(peer, reason)

    def report(self, event: LinkEvent) -> None:
        """Pass an event to the worker. A revocation takes effect here, so that a push may still win against it."""
        if self._closed:
            return
        if isinstance(event, Revoked) and event.peer in self._links:
            self._links[event.peer].acceptances.revoke(event.ticket)
        self.on_event(event)

    def receive(self, delivery: Delivery) -> None:
        """Something has arrived; it is ignored unless its link is up here."""
        link = self._links.get(delivery.source)
        if link is None or link.number != delivery.link:
            return
        match delivery.item:
            case LinkEnd(reason):
                self.lose(delivery.source, reason)
            case Push() as push:
                self._receive_push(delivery.source, link, push)
            case message:
                self.network.post(self, MessageArrived(delivery.source, message))

    # ---- inside ----

    @property
    def _transport(self) -> str:
        return TRANSPORT if self.ledger is None else OWNER

    def _drop(self, peer: WorkerKey, reason: str) -> None:
        link = self._links[peer]
        self.network.send(Delivery(self.key, peer, link.number, LinkEnd(reason)))
        self.lose(peer, reason)

    def _send(self, peer: WorkerKey, link: _InprocLink, message: HandoffMessage) -> None:
        self.network.send(Delivery(self.key, peer, link.number, message))

    def _push(self, effect: SendBlocks) -> Push:
        layers = (effect.first_layer, effect.num_layers)
        spans = [layers_span(self.memory, block_id, *layers) for block_id in effect.block_ids]
        return push_of(effect, digests(self.memory.region, spans), list(effect.block_ids), None)

    def _receive_push(self, peer: WorkerKey, link: _InprocLink, push: Push) -> None:
        source = self.network.find(peer)
        if source is None and self.ledger is None:
            return  # its memory died with it
        num_blocks = self.memory.num_blocks if source is None else source.memory.num_blocks
        try:
            check_push(push, num_blocks, self.memory.num_layers)
        except ProtocolError as err:
            self._drop(peer, str(err))
            return
        claim = link.acceptances.claim(push)
        if claim is None:
            return
        given = given_blocks(push, self.memory.num_layers, self._is_given if self.ledger is not None else None)
        blocks = [given.get(ordinal, claim.table[ordinal]) for ordinal in push.ordinals]
        lost: set[int] = set()
        for ordinal, slot, block in zip(push.ordinals, push.source_slots, blocks, strict=True):
            if ordinal in given:
                self.network.stay(self, push, ordinal, block)
            elif source is None or not source.owns(slot):
                lost.add(ordinal)
            else:
                self.network.move(source, self, push, slot, block)
        spans = [layers_span(self.memory, block, push.first_layer, push.num_layers) for block in blocks]
        corrupt = sorted(lost.union(corrupt_ordinals(push, digests(self.memory.region, spans))))
        outcome = link.acceptances.finish(push)
        if outcome.arrived or corrupt:
            self.network.post(self, arrived_event(peer, push, outcome, corrupt, given))

    def owns(self, block_id: int) -> bool:
        """The block is this worker's to be read; always, where nothing is shared."""
        return self.ledger is None or self.ledger.entry(block_id).owner == self.owner

    def _is_given(self, block_id: int, generation: int) -> bool:
        assert self.ledger is not None
        return is_given(self.ledger, block_id, self.owner, generation)


def _key(peer: Peer) -> WorkerKey:
    return WorkerKey(peer.worker_id, peer.epoch)
