"""The prefill side of all hand-offs of one worker: who has been offered what, and which blocks have gone.

    open → Offer … Grant → blocks_ready → SendBlocks …          seal → SendBlocks, Done … Ack → SourceEnded("")
    at any moment: fail, Cancel, peer lost, lease over, offer unanswered               → SourceEnded(code)

Pure: calls and messages in, effects out, `now` passed in. A ticket ends exactly once, with one SourceEnded. Until then
the blocks named to `blocks_ready` and `seal` must keep their bytes: the link may still read them. After an end, a late
call or message about the ticket changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import InternalError, LeaseExpired, NodeLost, TransferFailed
from ..core.ids import BlockId, Ticket, WorkerKey
from ..protocol.messages import Ack, Cancel, Done, Failed, Grant, HandoffMessage, Offer, Phases, Renew, SampledToken
from .effects import SendBlocks, SendMessage, SourceEffect, SourceEnded
from .renewal import Renewals
from .wording import safe_code, safe_text


@dataclass(slots=True)
class _Outgoing:
    """One live hand-off. Blocks below `num_pushed` are with the link, or held by the destination."""

    peer: WorkerKey
    num_tokens: int
    num_blocks: int
    lease_until: float
    answer_until: float | None  # None once the destination has shown that it knows the ticket
    grant: Grant | None = None
    ready: tuple[BlockId, ...] = ()
    num_pushed: int = 0
    sealed: tuple[tuple[SampledToken, ...], Phases] | None = None
    done: Done | None = None  # set once it has been sent
    done_at: float = 0.0


class SourceTable:
    """All hand-offs that this worker sends. `stale` counts messages that fit no live ticket, peer or generation.

    `lease_s`: a ticket ends when its peer has not named it for so long.
    `offer_timeout_s`: the peer's time to show that it knows an offered ticket at all.
    Unknown tickets in a Renew are not counted: they cross with every end.
    """

    def __init__(self, lease_s: float, offer_timeout_s: float, blocks_per_push: int = 64) -> None:
        self._lease_s, self._offer_timeout_s, self._blocks_per_push = lease_s, offer_timeout_s, blocks_per_push
        self._outgoing: dict[Ticket, _Outgoing] = {}
        self._renewals = Renewals(lease_s / 3)
        self.stale = 0

    # ---- calls of the role ----

    def open(self, ticket: Ticket, peer: WorkerKey, num_tokens: int, num_blocks: int, now: float) -> list[SourceEffect]:
        """Begin a hand-off of `num_blocks` blocks to `peer`; raises InternalError for a ticket that is open already."""
        if ticket in self._outgoing or num_blocks < 1:
            raise InternalError(f"ticket {ticket.hex()}: open twice, or {num_blocks} blocks; each ticket is used once")
        lease_until, answer_until = now + self._lease_s, now + self._offer_timeout_s
        self._outgoing[ticket] = _Outgoing(peer, num_tokens, num_blocks, lease_until, answer_until)
        self._renewals.watch(peer, now)
        return [SendMessage(peer, Offer(ticket=ticket, num_tokens=num_tokens, num_blocks=num_blocks))]

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
        num_tokens: int,
        first_tokens: tuple[SampledToken, ...],
        phases: Phases,
        now: float,
    ) -> list[SourceEffect]:
        """All is computed: push the rest, then Done. Raises InternalError for other counts than the offer's."""
        out = self._outgoing.get(ticket)
        if out is None:
            return []
        if out.sealed is not None or (len(block_ids), num_tokens) != (out.num_blocks, out.num_tokens):
            found = f"{len(block_ids)} blocks, {num_tokens} tokens"
            raise InternalError(f"seal {ticket.hex()}: {found}; offered {out.num_blocks} and {out.num_tokens}, once")
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
        return [self._end(ticket, NodeLost.code, f"lost the link to {peer}") for ticket in lost]

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
        renews = self._renewals.run([(out.peer, ticket) for ticket, out in self._outgoing.items()], now)
        return [*effects, *renews, *self._unanswered({renew.peer for renew in renews}, now)]

    # ---- looking in ----

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do; None while nothing is open."""
        times = [out.lease_until for out in self._outgoing.values()]
        times += [out.answer_until for out in self._outgoing.values() if out.answer_until is not None]
        times += [due for due in (self._renewals.next_due,) if due is not None and times]
        return min(times, default=None)

    def active(self) -> list[Ticket]:
        return list(self._outgoing)

    def check_invariants(self) -> None:
        """Raise AssertionError when the table contradicts itself."""
        for ticket, out in self._outgoing.items():
            held = out.grant.held if out.grant is not None else 0
            assert len(out.ready) <= out.num_blocks, ticket.hex()
            assert 0 <= held <= out.num_blocks, ticket.hex()
            assert out.num_pushed <= max(len(out.ready), held), ticket.hex()
            assert out.grant is not None or (out.num_pushed == 0 and out.done is None), ticket.hex()
            assert out.done is None or out.num_pushed == out.num_blocks, ticket.hex()
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
        if grant.held > out.num_blocks or (out.grant is not None and out.grant != grant):
            self.stale += 1
            return []
        out.lease_until, out.answer_until = now + self._lease_s, None
        out.grant = grant
        return self._progress(ticket, out, now)

    def _on_ack(self, peer: WorkerKey, ack: Ack) -> list[SourceEffect]:
        ticket = Ticket(ack.ticket)
        out = self._mine(peer, ticket)
        if out is None:
            return []
        if out.done is None or out.done.generation != ack.generation:
            self.stale += 1
            return []
        return [self._end(ticket)]

    def _on_cancel(self, peer: WorkerKey, cancel: Cancel) -> list[SourceEffect]:
        ticket = Ticket(cancel.ticket)
        if self._mine(peer, ticket) is None:
            return []
        return [self._end(ticket, cancel.code or TransferFailed.code, cancel.message)]

    def _on_renew(self, peer: WorkerKey, renew: Renew, now: float) -> None:
        for ticket in renew.tickets:
            out = self._outgoing.get(Ticket(ticket))
            if out is not None and out.peer == peer:
                out.lease_until, out.answer_until = now + self._lease_s, None

    def _progress(self, ticket: Ticket, out: _Outgoing, now: float) -> list[SourceEffect]:
        """Push all that is ready and allowed; Done behind the last push."""
        if out.grant is None:
            return []
        effects: list[SourceEffect] = []
        first, stop = max(out.num_pushed, out.grant.held), len(out.ready)
        for start in range(first, stop, self._blocks_per_push):
            ordinals = range(start, min(start + self._blocks_per_push, stop))
            block_ids = tuple(out.ready[ordinal] for ordinal in ordinals)
            effects.append(SendBlocks(out.peer, ticket, out.grant.generation, tuple(ordinals), block_ids))
        out.num_pushed = max(first, stop)
        if out.sealed is not None and out.done is None:
            out.done, out.done_at = _done(ticket, out, out.grant, *out.sealed), now
            effects.append(SendMessage(out.peer, out.done))
        return effects

    def _unanswered(self, peers: set[WorkerKey], now: float) -> list[SourceEffect]:
        """Done again, where neither Ack nor Cancel has come for a while: without it both sides would wait for ever."""
        late = now - self._lease_s / 3
        outs = [out for out in self._outgoing.values() if out.peer in peers and out.done_at <= late]
        return [SendMessage(out.peer, out.done) for out in outs if out.done is not None]

    def _give_up(self, ticket: Ticket, code: str, message: str) -> list[SourceEffect]:
        peer = self._outgoing[ticket].peer
        failed = Failed(ticket=ticket, code=safe_code(code), message=safe_text(message))
        return [SendMessage(peer, failed), self._end(ticket, failed.code, failed.message)]

    def _end(self, ticket: Ticket, code: str = "", message: str = "") -> SourceEnded:
        del self._outgoing[ticket]
        return SourceEnded(ticket, code, message)


def _take_table(out: _Outgoing, ticket: Ticket, block_ids: list[BlockId]) -> None:
    """Remember the longer table; raises InternalError when it shrinks or outgrows the offer."""
    if not len(out.ready) <= len(block_ids) <= out.num_blocks:
        bounds = f"from {len(out.ready)} to {out.num_blocks} are possible"
        raise InternalError(f"ticket {ticket.hex()}: a table of {len(block_ids)} blocks, {bounds}")
    out.ready = tuple(block_ids)


def _done(ticket: Ticket, out: _Outgoing, grant: Grant, first_tokens: tuple[SampledToken, ...], phases: Phases) -> Done:
    return Done(
        ticket=ticket,
        generation=grant.generation,
        num_blocks=out.num_blocks - grant.held,
        num_tokens=out.num_tokens,
        first_tokens=first_tokens,
        phases=phases,
    )
