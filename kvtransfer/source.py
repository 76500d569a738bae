"""The prefill side of all hand-offs of one worker: who has been offered what, and which blocks have gone.

    open → Offer … Grant → layers_computed, blocks_ready → SendBlocks …
                    seal → SendBlocks, Done … Ack                                    → SourceEnded("")
    at any moment: fail, Cancel, peer lost, lease over, offer unanswered             → SourceEnded(code)

Blocks leave as soon as they are computed and granted: layer by layer while the chunk that fills them is computed, when
enough bytes come together to be worth a push; else whole, when it is done.

Pure: calls and messages in, effects out, `now` passed in. A ticket ends exactly once, with one SourceEnded. Until then
the blocks named here must keep their bytes: the link may still read them. After an end, a late call or message about
the ticket changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.errors import InternalError, LeaseExpired, NodeLost, TransferFailed
from ..core.ids import BlockId, Ticket, WorkerKey
from ..protocol.messages import (
    NO_PROOF,
    Ack,
    Cancel,
    Done,
    Failed,
    Grant,
    HandoffMessage,
    Offer,
    Phases,
    Reached,
    Renew,
    SampledToken,
)
from .effects import Renewing, SendBlocks, SendMessage, SourceEffect, SourceEnded, Withdraw
from .wording import safe_code, safe_text


@dataclass(frozen=True, slots=True)
class PushSizes:
    """In layers of blocks: a push has at most `most`; layers of a chunk leave before its end when there are `least`."""

    num_layers: int
    most: int
    least: int

    @classmethod
    def of(cls, num_layers: int, layer_bytes: int, most_bytes: int = 8 << 20, least_bytes: int = 1 << 20) -> PushSizes:
        return cls(num_layers, max(1, most_bytes // layer_bytes), max(1, -(-least_bytes // layer_bytes)))


@dataclass(frozen=True, slots=True)
class HandoffPlan:
    """What is offered: `num_blocks` blocks for `num_tokens` tokens; those below `reached` are in the first chunk."""

    num_tokens: int
    num_blocks: int
    block_size: int
    reached: int
    proof: bytes = NO_PROOF


@dataclass(slots=True)
class _Front:
    """Blocks of the chunk in progress that leave layer by layer: from ordinal `first` on, gone below `num_layers`."""

    first: int
    block_ids: tuple[BlockId, ...]
    num_layers: int = 0


@dataclass(slots=True)
class _Outgoing:
    """One live hand-off. Blocks below `num_pushed` are with the link in all layers, or held by the destination."""

    peer: WorkerKey
    plan: HandoffPlan
    lease_until: float
    answer_until: float | None  # None once the destination has shown that it knows the ticket
    grant: Grant | None = None
    ready: tuple[BlockId, ...] = ()
    num_pushed: int = 0
    front: _Front | None = None
    sealed: tuple[tuple[SampledToken, ...], Phases] | None = None
    done: Done | None = None  # set once it has been sent
    said_at: float = 0.0  # the last Reached or Done; said again when nothing comes of it

    @property
    def next_push(self) -> int:
        """The first ordinal that has to travel and has not gone in all layers."""
        return max(self.num_pushed, self.grant.held if self.grant else 0)

    @property
    def is_waiting(self) -> bool:
        """Something is computed, or said to be, and the destination has not done its part."""
        return self.done is not None or self.grant is None or self.grant.stop < len(self.ready)


class SourceTable:
    """All hand-offs that this worker sends. `stale` counts messages that fit no live ticket, peer or generation.

    `lease_s`: a ticket ends when its peer has not named it for so long.
    `offer_timeout_s`: the peer's time to show that it knows an offered ticket at all.
    Unknown tickets in a Renew are not counted: they cross with every end.
    """

    def __init__(self, lease_s: float, offer_timeout_s: float, sizes: PushSizes) -> None:
        self._lease_s, self._offer_timeout_s, self._sizes = lease_s, offer_timeout_s, sizes
        self._outgoing: dict[Ticket, _Outgoing] = {}
        self.stale = 0

    # ---- calls of the role ----

    def open(self, ticket: Ticket, peer: WorkerKey, plan: HandoffPlan, now: float) -> list[SourceEffect]:
        """Begin a hand-off to `peer`; raises InternalError for a ticket that is open already."""
        if ticket in self._outgoing or plan.num_blocks < 1:
            raise InternalError(f"ticket {ticket.hex()}: open twice, or {plan.num_blocks} blocks; each is used once")
        lease_until, answer_until = now + self._lease_s, now + self._offer_timeout_s
        self._outgoing[ticket] = _Outgoing(peer, plan, lease_until, answer_until, said_at=now)
        return [Renewing(peer, ticket, is_alive=True), SendMessage(peer, _offer(ticket, plan))]

    def reach(self, ticket: Ticket, reached: int, now: float) -> list[SourceEffect]:
        """A chunk begins that ends below block `reached`: the destination may make room."""
        out = self._outgoing.get(ticket)
        if out is None or reached <= out.plan.reached:
            return []
        return [self._say_reached(ticket, out, min(reached, out.plan.num_blocks), now)]

    def layers_computed(
        self, ticket: Ticket, block_ids: list[BlockId], num_layers: int, now: float
    ) -> list[SourceEffect]:
        """Within a step: `num_layers` layers of all blocks in the table `block_ids` are in the cache."""
        out = self._outgoing.get(ticket)
        if out is None or out.grant is None or out.next_push < len(out.ready):
            return []
        if out.front is None:
            table = block_ids[out.next_push : out.grant.stop]
            out.front = _Front(out.next_push, tuple(table)) if table else None
        front = out.front
        if front is None or not self._is_worth_a_push(front, num_layers):
            return []
        return self._push_front(ticket, out, num_layers)

    def blocks_ready(self, ticket: Ticket, block_ids: list[BlockId], now: float) -> list[SourceEffect]:
        """`block_ids` is the sequence's table up to now, every block in it complete in all layers."""
        out = self._outgoing.get(ticket)
        if out is None:
            return []
        _take_table(out, ticket, block_ids)
        return self._progress(ticket, out, now)

    def seal(
        self,
        ticket: Ticket,
        block_ids: list[BlockId],
        first_tokens: tuple[SampledToken, ...],
        phases: Phases,
        now: float,
    ) -> list[SourceEffect]:
        """All is computed: push the rest, then Done. Raises InternalError for another count than the offer's."""
        out = self._outgoing.get(ticket)
        if out is None:
            return []
        if out.sealed is not None or len(block_ids) != out.plan.num_blocks:
            raise InternalError(f"seal {ticket.hex()}: {len(block_ids)} blocks; offered {out.plan.num_blocks}, once")
        _take_table(out, ticket, block_ids)
        out.sealed = (first_tokens, phases)
        return self._progress(ticket, out, now)

    def fail(self, ticket: Ticket, code: str, message: str, now: float) -> list[SourceEffect]:
        """Give this hand-off up and tell the destination. Nothing happens for a ticket that has ended."""
        if ticket not in self._outgoing:
            return []
        return self._give_up(ticket, code, message)

    # ---- what the link reports ----

    def on_message(self, peer: WorkerKey, message: HandoffMessage, now: float) -> list[SourceEffect]:
        """Handle what the destination `peer` says."""
        match message:
            case Grant():
                return self._on_grant(peer, message, now)
            case Ack():
                return self._on_ack(peer, message)
            case Cancel():
                return self._on_cancel(peer, message)
            case Renew():
                self._on_renew(peer, message, now)
                return []
            case _:
                self.stale += 1
                return []

    def peer_lost(self, peer: WorkerKey, now: float) -> list[SourceEffect]:
        """End every hand-off with this incarnation."""
        lost = [ticket for ticket, out in self._outgoing.items() if out.peer == peer]
        message = f"lost the link to {peer}"
        return [effect for ticket in lost for effect in self._end(ticket, NodeLost.code, message)]

    def tick(self, now: float) -> list[SourceEffect]:
        """Run every timer that is due. Call it behind the events that have arrived, or a late look ends what lives."""
        effects: list[SourceEffect] = []
        for ticket, out in list(self._outgoing.items()):
            if now >= out.lease_until:
                message = f"{out.peer} has not renewed for {self._lease_s:g} s"
                effects += self._give_up(ticket, LeaseExpired.code, message)
            elif out.answer_until is not None and now >= out.answer_until:
                message = f"{out.peer} has not answered the offer in {self._offer_timeout_s:g} s"
                effects += self._give_up(ticket, TransferFailed.code, message)
            elif out.answer_until is None and out.is_waiting and now >= self._repeat_at(out):
                effects.append(self._repeat(ticket, out, now))
        return effects

    # ---- looking in ----

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do; None while nothing is open."""
        outs = self._outgoing.values()
        times = [
            out.lease_until if out.answer_until is None else min(out.lease_until, out.answer_until) for out in outs
        ]
        times += [self._repeat_at(out) for out in outs if out.answer_until is None and out.is_waiting]
        return min(times, default=None)

    def active(self) -> list[Ticket]:
        return list(self._outgoing)

    def check_invariants(self) -> None:
        """Raise AssertionError when the table contradicts itself."""
        for ticket, out in self._outgoing.items():
            num_blocks = out.plan.num_blocks
            held, stop = (out.grant.held, out.grant.stop) if out.grant is not None else (0, 0)
            assert len(out.ready) <= num_blocks, ticket.hex()
            assert 0 <= held <= stop <= num_blocks, ticket.hex()
            assert out.num_pushed <= max(min(len(out.ready), stop), held), ticket.hex()
            assert out.grant is not None or (out.num_pushed == 0 and out.done is None), ticket.hex()
            assert out.done is None or out.next_push == num_blocks, ticket.hex()
            assert out.front is None or out.front.first + len(out.front.block_ids) <= stop, ticket.hex()
            assert out.grant is None or out.answer_until is None, ticket.hex()

    # ---- inside ----

    def _mine(self, peer: WorkerKey, ticket: Ticket) -> _Outgoing | None:
        """The live hand-off with this peer; counts a stale message when there is none."""
        out = self._outgoing.get(ticket)
        if out is None or out.peer != peer:
            self.stale += 1
            return None
        return out

    def _on_grant(self, peer: WorkerKey, grant: Grant, now: float) -> list[SourceEffect]:
        ticket = Ticket(grant.ticket)
        out = self._mine(peer, ticket)
        if out is None:
            return []
        if not grant.held <= grant.stop <= out.plan.num_blocks or not _goes_on(out.grant, grant):
            self.stale += 1
            return []
        out.lease_until, out.answer_until = now + self._lease_s, None
        if out.grant is None or grant.stop > out.grant.stop:
            out.grant, out.said_at = grant, now
        return self._progress(ticket, out, now)

    def _on_ack(self, peer: WorkerKey, ack: Ack) -> list[SourceEffect]:
        ticket = Ticket(ack.ticket)
        out = self._mine(peer, ticket)
        if out is None:
            return []
        if out.done is None or out.done.generation != ack.generation:
            self.stale += 1
            return []
        return self._end(ticket)

    def _on_cancel(self, peer: WorkerKey, cancel: Cancel) -> list[SourceEffect]:
        ticket = Ticket(cancel.ticket)
        if self._mine(peer, ticket) is None:
            return []
        return self._end(ticket, cancel.code or TransferFailed.code, cancel.message)

    def _on_renew(self, peer: WorkerKey, renew: Renew, now: float) -> None:
        for ticket in renew.tickets:
            out = self._outgoing.get(Ticket(ticket))
            if out is not None and out.peer == peer:
                out.lease_until, out.answer_until = now + self._lease_s, None

    # ---- pushing ----

    def _is_worth_a_push(self, front: _Front, num_layers: int) -> bool:
        fresh = (num_layers - front.num_layers) * len(front.block_ids)
        return fresh >= self._sizes.least or (num_layers == self._sizes.num_layers and fresh > 0)

    def _push_front(self, ticket: Ticket, out: _Outgoing, num_layers: int) -> list[SourceEffect]:
        """The layers of the front below `num_layers` that have not gone."""
        front, grant = out.front, out.grant
        assert front is not None
        assert grant is not None
        first_layer, count = front.num_layers, num_layers - front.num_layers
        front.num_layers = num_layers
        if count <= 0:
            return []
        depth = min(count, self._sizes.most)
        per_push = self._sizes.most // depth
        return [
            SendBlocks(
                out.peer,
                ticket,
                grant.generation,
                tuple(range(front.first + start, front.first + start + len(part))),
                part,
                first,
                min(depth, num_layers - first),
            )
            for first in range(first_layer, num_layers, depth)
            for start in range(0, len(front.block_ids), per_push)
            for part in (front.block_ids[start : start + per_push],)
        ]

    def _progress(self, ticket: Ticket, out: _Outgoing, now: float) -> list[SourceEffect]:
        """Push all that is ready and granted, the rest of a front first; Done behind the last push."""
        if out.grant is None:
            return []
        effects: list[SourceEffect] = []
        while out.front is not None or out.next_push < min(len(out.ready), out.grant.stop):
            if out.front is None:
                out.front = _Front(out.next_push, out.ready[out.next_push : out.grant.stop])
            stop = out.front.first + len(out.front.block_ids)
            if stop > len(out.ready):
                break  # its chunk is still being computed
            effects += self._push_front(ticket, out, self._sizes.num_layers)
            out.num_pushed, out.front = stop, None
        if out.sealed is not None and out.done is None and out.next_push == out.plan.num_blocks:
            out.done, out.said_at = _done(ticket, out, out.grant, *out.sealed), now
            effects.append(SendMessage(out.peer, out.done))
        return effects

    # ---- saying things again ----

    def _repeat_at(self, out: _Outgoing) -> float:
        return out.said_at + self._lease_s / 3

    def _repeat(self, ticket: Ticket, out: _Outgoing, now: float) -> SendMessage:
        """Done or Reached again, where nothing came of it for a while: without it both sides would wait for ever."""
        if out.done is None:
            return self._say_reached(ticket, out, out.plan.reached, now)
        out.said_at = now
        return SendMessage(out.peer, out.done)

    def _say_reached(self, ticket: Ticket, out: _Outgoing, reached: int, now: float) -> SendMessage:
        out.plan = replace(out.plan, reached=reached)
        out.said_at = now
        return SendMessage(out.peer, Reached(ticket=ticket, reached=reached))

    # ---- ending ----

    def _give_up(self, ticket: Ticket, code: str, message: str) -> list[SourceEffect]:
        peer = self._outgoing[ticket].peer
        failed = Failed(ticket=ticket, code=safe_code(code), message=safe_text(message))
        return [SendMessage(peer, failed), *self._end(ticket, failed.code, failed.message)]

    def _end(self, ticket: Ticket, code: str = "", message: str = "") -> list[SourceEffect]:
        peer = self._outgoing.pop(ticket).peer
        return [Withdraw(peer, ticket), Renewing(peer, ticket, is_alive=False), SourceEnded(ticket, code, message)]


def _goes_on(known: Grant | None, grant: Grant) -> bool:
    """A grant again, or its continuation; an older one that comes late is neither news nor an error."""
    return known is None or (known.generation, known.held) == (grant.generation, grant.held)


def _take_table(out: _Outgoing, ticket: Ticket, block_ids: list[BlockId]) -> None:
    """Remember the longer table; raises InternalError when it shrinks or outgrows the offer."""
    if not len(out.ready) <= len(block_ids) <= out.plan.num_blocks:
        bounds = f"from {len(out.ready)} to {out.plan.num_blocks} are possible"
        raise InternalError(f"ticket {ticket.hex()}: a table of {len(block_ids)} blocks, {bounds}")
    out.ready = tuple(block_ids)


def _offer(ticket: Ticket, plan: HandoffPlan) -> Offer:
    return Offer(
        ticket=ticket,
        num_tokens=plan.num_tokens,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        reached=plan.reached,
        proof=plan.proof,
    )


def _done(ticket: Ticket, out: _Outgoing, grant: Grant, first_tokens: tuple[SampledToken, ...], phases: Phases) -> Done:
    return Done(
        ticket=ticket,
        generation=grant.generation,
        num_blocks=out.plan.num_blocks - grant.held,
        num_tokens=out.plan.num_tokens,
        first_tokens=first_tokens,
        phases=phases,
    )
