"""Hand-off links between simulated workers: the same effects and events as the real mesh, on virtual time, with faults.

A push is carried as one item and copied at delivery, straight from the source's pool, as shared memory does: a block that its source
reuses too early is read wrong here too. Every write is checked against the rules of architecture §4 when it happens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import xxhash

from ..core.ids import BlockId, Ticket, WorkerKey
from ..engine.kv_memory import KVMemory
from ..kvtransfer.effects import (
    AcceptBlocks,
    BlocksArrived,
    LinkEffect,
    LinkEvent,
    MessageArrived,
    PeerLost,
    PeerUp,
    Revoke,
    Revoked,
    SendBlocks,
    SendMessage,
)
from ..protocol import codec
from ..protocol.messages import Ack, Cancel, Failed, HandoffMessage, Offer, Peer
from .chaos import ChaosProfile, Wire
from .events import EventQueue

RECONNECT_S = 0.1
OnEvent = Callable[[LinkEvent], None]
WriteCheck = Callable[["SimMesh", AcceptBlocks, BlockId], None]
ReadCheck = Callable[["SimMesh", SendBlocks, BlockId, int], None]


class SimMesh:
    """All links of one simulated worker. `network` is shared by all of them."""

    def __init__(self, network: SimNetwork, key: WorkerKey, role: str, memory: KVMemory, on_event: OnEvent) -> None:
        self._network, self.key, self.role, self.memory, self.on_event = network, key, role, memory, on_event
        self.peers: dict[WorkerKey, dict[str, Wire]] = {}
        self.accepted: dict[tuple[WorkerKey, Ticket], AcceptBlocks] = {}
        self.missing: dict[tuple[WorkerKey, Ticket], set[int]] = {}
        self.is_alive = True
        network.meshes[key] = self

    @property
    def address(self) -> str:
        return f"sim:{self.key}"

    @property
    def transports(self) -> list[str]:
        return ["sim"]

    def linked(self) -> list[tuple[WorkerKey, str]]:
        return [(peer, "sim") for peer in self.peers]

    def set_peers(self, peers: list[Peer]) -> None:
        known = {WorkerKey(p.worker_id, p.epoch) for p in peers}
        for gone in [p for p in self.peers if p not in known]:
            self._network.cut(self.key, gone, "no longer listed")
        if self.role == "prefill":
            return
        for peer in peers:
            if peer.role != "decode":
                self._network.connect(self.key, WorkerKey(peer.worker_id, peer.epoch))

    def perform(self, effect: LinkEffect) -> None:
        if effect.peer not in self.peers:
            return
        match effect:
            case SendMessage(peer=peer, message=message):
                self._network.send(self, peer, message)
            case SendBlocks():
                self._network.push(self, effect)
            case AcceptBlocks():
                if effect.blocks:
                    self.accepted[effect.peer, effect.ticket] = effect
                    self.missing[effect.peer, effect.ticket] = set(effect.blocks)
            case Revoke(peer=peer, ticket=ticket):
                self._network.revoke(self, peer, ticket)

    def close(self) -> None:
        self.is_alive = False
        for peer in list(self.peers):
            self._network.cut(self.key, peer, "closed")
        self._network.meshes.pop(self.key, None)


class SimNetwork:
    """Carries hand-off messages and pushes between meshes."""

    def __init__(self, events: EventQueue, profile: ChaosProfile, rng: random.Random, faults: Counter[str]) -> None:
        self._events, self._profile, self._rng, self._faults = events, profile, rng, faults
        self.meshes: dict[WorkerKey, SimMesh] = {}
        self.is_calm = False
        self.check_write: WriteCheck | None = None
        self.check_read: ReadCheck | None = None
        self.sent: Counter[str] = Counter()
        self.open_offers: dict[tuple[WorkerKey, WorkerKey], set[bytes]] = {}  # (source, destination) → offered, not closed

    def connect(self, a: WorkerKey, b: WorkerKey) -> None:
        left, right = self.meshes.get(a), self.meshes.get(b)
        if left is None or right is None or b in left.peers or a == b:
            return
        for mesh, peer in ((left, b), (right, a)):
            wire = Wire(self._events, self._profile, self._rng, self._faults)
            wire.is_calm = self.is_calm
            mesh.peers[peer] = {"wire": wire}
            mesh.on_event(PeerUp(peer, "sim"))

    def cut(self, a: WorkerKey, b: WorkerKey, reason: str) -> None:
        """The connection ends: each live side learns it, and nothing on its way arrives any more."""
        for key, peer in ((a, b), (b, a)):
            self.open_offers.pop((key, peer), None)
            mesh = self.meshes.get(key)
            if mesh is None or mesh.peers.pop(peer, None) is None:
                continue
            for at in [k for k in mesh.accepted if k[0] == peer]:
                del mesh.accepted[at], mesh.missing[at]
            if mesh.is_alive:
                mesh.on_event(PeerLost(peer, reason))

    def calm(self) -> None:
        """No more faults from now on."""
        self.is_calm = True
        for mesh in self.meshes.values():
            for wires in mesh.peers.values():
                wires["wire"].is_calm = True

    def _carry(self, sender: SimMesh, peer: WorkerKey, kind: str, arrive: Callable[[SimMesh], None]) -> None:
        wires = sender.peers[peer]
        if not self.is_calm and self._rng.random() < self._profile.cut:
            self._faults["cut link"] += 1
            self._events.after(0.0, lambda: self.cut(sender.key, peer, "link cut"))
            self._events.after(RECONNECT_S, lambda: self.connect(sender.key, peer))
            return

        def deliver() -> None:
            receiver = self.meshes.get(peer)
            if receiver is not None and sender.peers.get(peer) is wires and sender.key in receiver.peers:
                arrive(receiver)

        wires["wire"].carry(kind, deliver)

    def send(self, sender: SimMesh, peer: WorkerKey, message: HandoffMessage) -> None:
        frame = codec.handoff.encode(message)
        kind = type(message).__name__
        self.sent[kind] += 1
        self._note(sender.key, peer, message)

        def arrive(to: SimMesh) -> None:
            arrived = codec.handoff.decode(frame)
            if isinstance(arrived, Ack | Cancel):
                self.open_offers.get((to.key, sender.key), set()).discard(arrived.ticket)
            to.on_event(MessageArrived(sender.key, arrived))

        self._carry(sender, peer, kind, arrive)

    def _note(self, source: WorkerKey, destination: WorkerKey, message: HandoffMessage) -> None:
        offers = self.open_offers.setdefault((source, destination), set())
        if isinstance(message, Offer):
            offers.add(message.ticket)
        elif isinstance(message, Failed):
            offers.discard(message.ticket)

    def silent_ends(self, source: WorkerKey, active: list[Ticket]) -> list[bytes]:
        """Tickets that `source` has given up without a word to their destination."""
        offered = (tickets for (owner, _), tickets in self.open_offers.items() if owner == source)
        return sorted(set().union(*offered) - set(active))

    def push(self, sender: SimMesh, push: SendBlocks) -> None:
        digests = [xxhash.xxh3_64_digest(sender.memory.block(b)) for b in push.block_ids]
        self.sent["Push"] += 1
        self._carry(sender, push.peer, "Push", lambda to: self._arrive(sender, to, push, digests))

    def _arrive(self, sender: SimMesh, to: SimMesh, push: SendBlocks, digests: list[bytes]) -> None:
        grant = to.accepted.get((sender.key, push.ticket))
        if grant is None or grant.generation != push.generation:
            return
        missing = to.missing[sender.key, push.ticket]
        done: list[int] = []
        corrupt: list[int] = []
        for ordinal, source, digest in zip(push.ordinals, push.block_ids, digests, strict=True):
            if ordinal not in missing:
                continue
            missing.discard(ordinal)
            is_whole = self._copy(sender, to, grant, push, ordinal, source, digest)
            (done if is_whole else corrupt).append(ordinal)
        if not missing:
            del to.accepted[sender.key, push.ticket], to.missing[sender.key, push.ticket]
        to.on_event(BlocksArrived(sender.key, push.ticket, push.generation, tuple(done), tuple(corrupt)))

    def _copy(
        self, sender: SimMesh, to: SimMesh, grant: AcceptBlocks, push: SendBlocks, ordinal: int, source: BlockId, digest: bytes
    ) -> bool:
        target = grant.blocks[ordinal]
        if self.check_read is not None:
            self.check_read(sender, push, source, ordinal)
        if self.check_write is not None:
            self.check_write(to, grant, target)
        data = bytearray(sender.memory.block(source))
        if not self.is_calm and self._rng.random() < self._profile.corrupt:
            self._faults["corrupt block"] += 1
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
        to.memory.block(target)[:] = data
        return xxhash.xxh3_64_digest(to.memory.block(target)) == digest

    def revoke(self, mesh: SimMesh, peer: WorkerKey, ticket: Ticket) -> None:
        """A copy in progress may go on for a moment; then the acceptance is gone and the owner hears it."""

        def finish() -> None:
            mesh.accepted.pop((peer, ticket), None)
            mesh.missing.pop((peer, ticket), None)
            if peer in mesh.peers and mesh.is_alive:
                mesh.on_event(Revoked(peer, ticket))

        self._events.after(self._profile.delay_s, finish)
