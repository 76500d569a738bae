"""The decode side of all hand-offs of one worker: what is expected, offered, granted, and when blocks are safe again.

    expect … Offer → Offered … grant → AcceptBlocks, Grant … BlocksArrived …, Done (any order) → Ack, Received
    before the grant:  cancel, Failed, peer lost, lease or wait over → Cancel, ReceiveFailed
    after the grant:   the same, bad counts, bad digest → Revoke, Cancel … Revoked or peer lost → ReceiveFailed

Pure: calls, messages and link events in, effects out, `now` passed in. Each expected ticket ends exactly once. Granted
blocks are the role's again only with Received (the link has written the last ordinal and forgotten the ticket) or
ReceiveFailed (the link has confirmed that it writes nothing more, or is gone).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ..core.errors import ChecksumMismatch, InternalError, LeaseExpired, NodeLost, TransferFailed
from ..core.ids import BlockId, Ticket, WorkerKey
from ..protocol.messages import Ack, Cancel, Done, Failed, Grant, HandoffMessage, Offer, Renew
from .early import EarlyOffers
from .effects import (
    AcceptBlocks,
    BlocksArrived,
    DestinationEffect,
    Offered,
    Received,
    ReceiveFailed,
    Revoke,
    Revoked,
    SendMessage,
)
from .ended import Ended, EndedTickets
from .renewal import Renewals
from .wording import safe_code, safe_text


class _State(Enum):
    EXPECTED = "expected"  # the role waits for an offer
    OFFERED = "offered"  # the role may grant
    GRANTED = "granted"  # blocks may be written
    REVOKING = "revoking"  # failed; a write may still happen


@dataclass(slots=True)
class _Incoming:
    """One live hand-off. `missing` are the ordinals not yet here; `failure` is set while revoking."""

    peer: WorkerKey
    state: _State
    deadline: float
    num_tokens: int = 0
    num_blocks: int = 0
    generation: int = 0
    blocks: dict[int, BlockId] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)
    unheard: Grant | None = None  # no block and no Done shows yet that the source has the grant
    granted_at: float = 0.0
    done: Done | None = None
    failure: tuple[str, str] = ("", "")


class DestinationTable:
    """All hand-offs that this worker receives. `stale` counts messages that fit no live ticket, peer or generation.

    `lease_s`: an offered or granted ticket ends when its source has been silent about it for so long.
    `expect_timeout_s`: the backstop for an offer that never comes; the role's own deadline is shorter.
    `early_s`: how long an offer may come too early.
    Unknown tickets in a Renew are not counted: they cross with every end.
    """

    def __init__(
        self,
        lease_s: float,
        expect_timeout_s: float = 600.0,
        early_s: float = 5.0,
        max_early: int = 1024,
        max_ended: int = 4096,
    ) -> None:
        self._lease_s, self._expect_timeout_s = lease_s, expect_timeout_s
        self._incoming: dict[Ticket, _Incoming] = {}
        self._owner: dict[BlockId, Ticket] = {}  # blocks granted and not yet back
        self._early = EarlyOffers(max_early, early_s)
        self._ended = EndedTickets(max_ended)
        self._renewals = Renewals(lease_s / 3)
        self._generation = 0
        self.stale = 0

    # ---- calls of the role ----

    def expect(self, ticket: Ticket, peer: WorkerKey, now: float) -> list[DestinationEffect]:
        """`peer` will hand this ticket over. Raises InternalError for a ticket that has been expected before."""
        ended = self._ended.get(ticket)
        if ticket in self._incoming or (ended is not None and ended.was_expected):
            raise InternalError(f"ticket {ticket.hex()}: expected twice; each ticket is used once")
        if ended is not None and ended.peer == peer and isinstance(ended.last_word, Cancel):
            self._remember(ticket, peer, ended.last_word, now, was_expected=True)
            return [ReceiveFailed(ticket, ended.last_word.code, ended.last_word.message)]
        incoming = _Incoming(peer, _State.EXPECTED, now + self._expect_timeout_s)
        self._incoming[ticket] = incoming
        offer = self._early.take(peer, ticket)
        return [] if offer is None else self._offered(incoming, offer, now)

    def grant(self, ticket: Ticket, held: int, blocks: list[BlockId], now: float) -> list[DestinationEffect]:
        """Let the source write ordinals held, held + 1, … into `blocks`; the first `held` blocks are here already.

        Raises InternalError when the ticket is not waiting for a grant, or for a block that is granted already.
        """
        incoming = self._incoming.get(ticket)
        if incoming is None or incoming.state is not _State.OFFERED:
            state = "unknown" if incoming is None else incoming.state.value
            raise InternalError(f"ticket {ticket.hex()}: granted while {state}")
        if held < 0 or held + len(blocks) != incoming.num_blocks:
            raise InternalError(f"ticket {ticket.hex()}: {held} held + {len(blocks)} of {incoming.num_blocks} blocks")
        if len(set(blocks)) != len(blocks) or not self._owner.keys().isdisjoint(blocks):
            raise InternalError(f"ticket {ticket.hex()}: a block is granted twice")
        self._generation += 1
        incoming.state, incoming.generation = _State.GRANTED, self._generation
        incoming.blocks = dict(enumerate(blocks, held))
        incoming.missing = set(incoming.blocks)
        incoming.deadline = now + self._lease_s
        self._owner.update(dict.fromkeys(blocks, ticket))
        grant = Grant(ticket=ticket, generation=self._generation, held=held)
        incoming.unheard, incoming.granted_at = grant, now
        accept = AcceptBlocks(incoming.peer, ticket, self._generation, dict(incoming.blocks))
        return [accept, SendMessage(incoming.peer, grant)]

    def cancel(self, ticket: Ticket, code: str, message: str, now: float) -> list[DestinationEffect]:
        """The role does not want it any more. Nothing happens for a ticket that is unknown or has ended."""
        incoming = self._incoming.get(ticket)
        return [] if incoming is None else self._fail(ticket, incoming, code, message, now)

    # ---- what the link reports ----

    def on_message(self, peer: WorkerKey, message: HandoffMessage, now: float) -> list[DestinationEffect]:
        """Handle what the source `peer` says."""
        match message:
            case Offer():
                return self._on_offer(peer, message, now)
            case Done():
                return self._on_done(peer, message, now)
            case Failed():
                return self._on_failed(peer, message, now)
            case Renew():
                return self._on_renew(peer, message, now)
            case _:
                self.stale += 1
                return []

    def on_arrived(self, event: BlocksArrived, now: float) -> list[DestinationEffect]:
        """The link has written blocks, or found them corrupt."""
        incoming = self._incoming.get(event.ticket)
        if incoming is None or incoming.state is not _State.GRANTED or incoming.generation != event.generation:
            self.stale += 1
            return []
        incoming.deadline, incoming.unheard = now + self._lease_s, None
        if event.corrupt:
            message = f"{len(event.corrupt)} blocks differ from their digest, the first is ordinal {event.corrupt[0]}"
            return self._fail(event.ticket, incoming, ChecksumMismatch.code, message, now)
        incoming.missing.difference_update(event.ordinals)
        return self._maybe_complete(event.ticket, incoming, now)

    def on_revoked(self, event: Revoked, now: float) -> list[DestinationEffect]:
        """No write can follow for this ticket: its blocks go back with the failure."""
        incoming = self._incoming.get(event.ticket)
        if incoming is None or incoming.state is not _State.REVOKING or incoming.peer != event.peer:
            return []
        return [self._end_failed(event.ticket, incoming, *incoming.failure, now)]

    def peer_lost(self, peer: WorkerKey, now: float) -> list[DestinationEffect]:
        """End every hand-off with this incarnation; the link has said that no write can follow."""
        self._early.forget_peer(peer)
        effects: list[DestinationEffect] = []
        for ticket, incoming in [item for item in self._incoming.items() if item[1].peer == peer]:
            failure = (NodeLost.code, f"lost the link to {peer}")
            if incoming.state is _State.REVOKING:
                failure = incoming.failure
            if incoming.state is _State.GRANTED:
                # The grant may have reached a link that is newer than this loss.
                effects.append(Revoke(peer, ticket))
            effects.append(self._end_failed(ticket, incoming, *failure, now))
        return effects

    def tick(self, now: float) -> list[DestinationEffect]:
        """Run every timer that is due. Call it behind the events that have arrived, or a late look ends what lives."""
        effects: list[DestinationEffect] = [self._refuse_early(*key, now) for key in self._early.expired(now)]
        for ticket, incoming in list(self._incoming.items()):
            if incoming.state is _State.REVOKING or now < incoming.deadline:
                continue
            code, message = LeaseExpired.code, f"{incoming.peer} has not renewed for {self._lease_s:g} s"
            if incoming.state is _State.EXPECTED:
                code, message = TransferFailed.code, f"{incoming.peer} has not offered in {self._expect_timeout_s:g} s"
            effects += self._fail(ticket, incoming, code, message, now)
        alive = (_State.OFFERED, _State.GRANTED)
        live = [(item.peer, ticket) for ticket, item in self._incoming.items() if item.state in alive]
        renews = self._renewals.run(live, now)
        return [*effects, *renews, *self._unheard({renew.peer for renew in renews}, now)]

    # ---- looking in ----

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do; None while nothing is waited for."""
        times = [item.deadline for item in self._incoming.values() if item.state is not _State.REVOKING]
        times += [time for time in (self._early.next_deadline, self._renewals.next_due) if time is not None]
        return min(times, default=None)

    def active(self) -> list[Ticket]:
        return list(self._incoming)

    @property
    def num_receiving(self) -> int:
        """Tickets whose blocks are granted."""
        return sum(item.state in (_State.GRANTED, _State.REVOKING) for item in self._incoming.values())

    @property
    def num_early(self) -> int:
        return len(self._early)

    def check_invariants(self) -> None:
        """Raise AssertionError when the table contradicts itself: above all, when a block is granted to two tickets."""
        granted: dict[BlockId, Ticket] = {}
        for ticket, item in self._incoming.items():
            has_blocks = item.state in (_State.GRANTED, _State.REVOKING)
            assert has_blocks or not item.blocks, (ticket.hex(), item.state)
            assert has_blocks == (item.generation > 0), (ticket.hex(), item.state)
            assert (item.state is _State.REVOKING) == bool(item.failure[0]), (ticket.hex(), item.failure)
            assert item.missing <= item.blocks.keys(), ticket.hex()
            assert item.state is not _State.GRANTED or item.done is None or item.missing, ticket.hex()
            assert granted.keys().isdisjoint(item.blocks.values()), ticket.hex()
            granted.update(dict.fromkeys(item.blocks.values(), ticket))
        assert granted == self._owner

    # ---- inside ----

    def _mine(self, peer: WorkerKey, ticket: Ticket) -> _Incoming | None:
        incoming = self._incoming.get(ticket)
        return incoming if incoming is not None and incoming.peer == peer else None

    def _not_mine(self, peer: WorkerKey, ticket: Ticket) -> list[DestinationEffect]:
        """Count a message about no live ticket; a source that still works on an ended one hears our last word again."""
        self.stale += 1
        ended = self._ended.get(ticket)
        return [SendMessage(peer, ended.last_word)] if ended is not None and ended.peer == peer else []

    def _on_offer(self, peer: WorkerKey, offer: Offer, now: float) -> list[DestinationEffect]:
        ticket = Ticket(offer.ticket)
        incoming = self._mine(peer, ticket)
        if incoming is None and ticket not in self._incoming and self._ended.get(ticket) is None:
            return [self._refuse_early(*key, now) for key in self._early.add(peer, offer, now)]
        if incoming is None:
            return self._not_mine(peer, ticket)
        if incoming.state is not _State.EXPECTED:
            self.stale += 1
            return []
        return self._offered(incoming, offer, now)

    def _offered(self, incoming: _Incoming, offer: Offer, now: float) -> list[DestinationEffect]:
        incoming.state, incoming.deadline = _State.OFFERED, now + self._lease_s
        incoming.num_tokens, incoming.num_blocks = offer.num_tokens, offer.num_blocks
        self._renewals.watch(incoming.peer, now)
        return [Offered(Ticket(offer.ticket), offer.num_tokens, offer.num_blocks)]

    def _on_done(self, peer: WorkerKey, done: Done, now: float) -> list[DestinationEffect]:
        ticket = Ticket(done.ticket)
        incoming = self._mine(peer, ticket)
        if incoming is None:
            return self._not_mine(peer, ticket)
        if incoming.state is not _State.GRANTED or incoming.generation != done.generation or incoming.done is not None:
            self.stale += 1
            return []
        incoming.deadline, incoming.unheard = now + self._lease_s, None
        counts, wanted = (done.num_blocks, done.num_tokens), (len(incoming.blocks), incoming.num_tokens)
        if counts != wanted:
            message = f"Done says (blocks, tokens) = {counts}, granted {wanted}"
            return self._fail(ticket, incoming, TransferFailed.code, message, now)
        incoming.done = done
        return self._maybe_complete(ticket, incoming, now)

    def _on_failed(self, peer: WorkerKey, failed: Failed, now: float) -> list[DestinationEffect]:
        ticket = Ticket(failed.ticket)
        code, message = failed.code or TransferFailed.code, failed.message
        incoming = self._mine(peer, ticket)
        if incoming is not None:
            return self._fail(ticket, incoming, code, message, now, tell_peer=False)
        if self._early.take(peer, ticket) is not None:
            cancel = Cancel(ticket=ticket, code=code, message=message)
            self._remember(ticket, peer, cancel, now, was_expected=False)
        elif self._ended.get(ticket) is None:
            self.stale += 1
        return []

    def _on_renew(self, peer: WorkerKey, renew: Renew, now: float) -> list[DestinationEffect]:
        effects: list[DestinationEffect] = []
        for ticket in map(Ticket, renew.tickets):
            incoming, ended = self._mine(peer, ticket), self._ended.get(ticket)
            if incoming is not None and incoming.state in (_State.OFFERED, _State.GRANTED):
                # After Done only blocks count: the source has nothing left to do but to send them.
                incoming.deadline = now + self._lease_s if incoming.done is None else incoming.deadline
            elif ended is not None and ended.peer == peer and now - ended.ended_at > self._lease_s / 10:
                # It should have heard by now: the word was lost, and its blocks wait for it.
                effects.append(SendMessage(peer, ended.last_word))
        return effects

    def _maybe_complete(self, ticket: Ticket, incoming: _Incoming, now: float) -> list[DestinationEffect]:
        if incoming.done is None or incoming.missing:
            return []
        ack = Ack(ticket=ticket, generation=incoming.generation)
        self._end(ticket, incoming, ack, now)
        return [SendMessage(incoming.peer, ack), Received(ticket, incoming.done)]

    def _unheard(self, peers: set[WorkerKey], now: float) -> list[DestinationEffect]:
        """Grant again, where nothing has come for a while: without it both sides would wait for ever."""
        late = now - self._lease_s / 3
        items = [item for item in self._incoming.values() if item.peer in peers and item.state is _State.GRANTED]
        return [SendMessage(item.peer, item.unheard) for item in items if item.unheard and item.granted_at <= late]

    def _fail(
        self, ticket: Ticket, incoming: _Incoming, code: str, message: str, now: float, tell_peer: bool = True
    ) -> list[DestinationEffect]:
        """Leave the good path. Whoever fails first gives the reason."""
        if incoming.state is _State.REVOKING:
            return []
        cancel = Cancel(ticket=ticket, code=safe_code(code), message=safe_text(message))
        tell: list[DestinationEffect] = [SendMessage(incoming.peer, cancel)] if tell_peer else []
        if incoming.state is _State.GRANTED:
            incoming.state, incoming.failure = _State.REVOKING, (cancel.code, cancel.message)
            return [Revoke(incoming.peer, ticket), *tell]
        return [*tell, self._end_failed(ticket, incoming, cancel.code, cancel.message, now)]

    def _end_failed(self, ticket: Ticket, incoming: _Incoming, code: str, message: str, now: float) -> ReceiveFailed:
        self._end(ticket, incoming, Cancel(ticket=ticket, code=code, message=message), now)
        return ReceiveFailed(ticket, code, message)

    def _end(self, ticket: Ticket, incoming: _Incoming, last_word: Ack | Cancel, now: float) -> None:
        del self._incoming[ticket]
        for block_id in incoming.blocks.values():
            del self._owner[block_id]
        self._remember(ticket, incoming.peer, last_word, now, was_expected=True)

    def _refuse_early(self, peer: WorkerKey, ticket: Ticket, now: float) -> SendMessage:
        cancel = Cancel(ticket=ticket, code=TransferFailed.code, message="nobody here expects this ticket")
        self._remember(ticket, peer, cancel, now, was_expected=False)
        return SendMessage(peer, cancel)

    def _remember(self, ticket: Ticket, peer: WorkerKey, word: Ack | Cancel, now: float, was_expected: bool) -> None:
        self._ended.add(ticket, Ended(peer, word, now, was_expected))
