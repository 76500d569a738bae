"""The decode side of all hand-offs of one worker: what is expected, offered, granted, and when blocks are safe again.

    expect … Offer → Offered, Reached → Advanced … grant (again and again) → AcceptBlocks, Grant …
                                                 … BlocksArrived …, Done (any order) → Ack, Received
    before the grant:  cancel, Failed, peer lost, lease or wait over → Cancel, ReceiveFailed
    after the grant:   the same, bad counts, bad digest → Revoke, Cancel … Revoked or peer lost → ReceiveFailed

Pure: calls, messages and link events in, effects out, `now` passed in. Each expected ticket ends exactly once. Granted
blocks are the role's again only with Received (the link has written the last ordinal and forgotten the ticket) or
ReceiveFailed (the link has confirmed that it writes nothing more, or is gone).
"""

from __future__ import annotations

import hmac

from ..core.errors import ChecksumMismatch, InternalError, LeaseExpired, NodeLost, TransferFailed
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
    Reached,
    Renew,
)
from .digest import DIGEST_BYTES
from .early import EarlyOffers
from .effects import (
    AcceptBlocks,
    Advanced,
    BlocksArrived,
    DestinationEffect,
    Offered,
    Received,
    ReceiveFailed,
    Renewing,
    Revoke,
    Revoked,
    SendMessage,
)
from .ended import Ended, EndedTickets
from .incoming import Granting, Incoming, State
from .wording import safe_code, safe_text


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
        self._incoming: dict[Ticket, Incoming] = {}
        self._owner: dict[BlockId, Ticket] = {}  # blocks granted and not yet back
        self._early = EarlyOffers(max_early, early_s)
        self._ended = EndedTickets(max_ended)
        self._generation = 0
        self.stale = 0

    # ---- calls of the role ----

    def expect(self, ticket: Ticket, peer: WorkerKey, now: float, proof: bytes = NO_PROOF) -> list[DestinationEffect]:
        """`peer` will hand this ticket over, with this proof. Raises InternalError for one expected before."""
        ended = self._ended.get(ticket)
        if ticket in self._incoming or (ended is not None and ended.was_expected):
            raise InternalError(f"ticket {ticket.hex()}: expected twice; each ticket is used once")
        if ended is not None and ended.peer == peer and isinstance(ended.last_word, Cancel):
            self._remember(ticket, peer, ended.last_word, now, was_expected=True)
            return [ReceiveFailed(ticket, ended.last_word.code, ended.last_word.message)]
        incoming = Incoming(peer, State.EXPECTED, now + self._expect_timeout_s, proof)
        self._incoming[ticket] = incoming
        offer = self._early.take(peer, ticket)
        return [] if offer is None else self._offered(ticket, incoming, offer, now)

    def grant(self, ticket: Ticket, granting: Granting, now: float) -> list[DestinationEffect]:
        """Let the source write, or write more: a later grant goes on where the last one ended.

        Raises InternalError when the ticket is not waiting for a grant, or for a block that is granted already.
        """
        incoming = self._incoming.get(ticket)
        if incoming is None or incoming.state not in (State.OFFERED, State.GRANTED):
            state = "unknown" if incoming is None else incoming.state.value
            raise InternalError(f"ticket {ticket.hex()}: granted while {state}")
        self._check_grant(ticket, incoming, granting)
        if incoming.state is State.OFFERED:
            self._generation += 1
            incoming.state, incoming.generation = State.GRANTED, self._generation
        first = incoming.granted.stop if incoming.granted is not None else granting.held
        incoming.granted, incoming.said_at = granting, now
        incoming.deadline = now + self._lease_s
        self._owner.update(dict.fromkeys(incoming.own_blocks, ticket))
        assert incoming.offer is not None
        accept = AcceptBlocks(
            incoming.peer,
            ticket,
            incoming.generation,
            first,
            granting.stop,
            granting.table,
            incoming.offer.num_tokens,
        )
        return [accept, SendMessage(incoming.peer, _grant(ticket, incoming))]

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
            case Reached():
                return self._on_reached(peer, message, now)
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
        if incoming is None or incoming.state is not State.GRANTED or incoming.generation != event.generation:
            self.stale += 1
            return []
        incoming.deadline, incoming.said_at = now + self._lease_s, now
        if event.corrupt:
            message = f"{len(event.corrupt)} blocks differ from their digest, the first is ordinal {event.corrupt[0]}"
            return self._fail(event.ticket, incoming, ChecksumMismatch.code, message, now)
        incoming.digests.update(zip(event.ordinals, event.digests, strict=True))
        incoming.given.update(event.given)
        return self._maybe_complete(event.ticket, incoming, now)

    def on_revoked(self, event: Revoked, now: float) -> list[DestinationEffect]:
        """No write can follow for this ticket: its blocks go back with the failure."""
        incoming = self._incoming.get(event.ticket)
        if incoming is None or incoming.state is not State.REVOKING or incoming.peer != event.peer:
            return []
        return self._end_failed(event.ticket, incoming, *incoming.failure, now)

    def peer_lost(self, peer: WorkerKey, now: float) -> list[DestinationEffect]:
        """End every hand-off with this incarnation; the link has said that no write can follow."""
        self._early.forget_peer(peer)
        effects: list[DestinationEffect] = []
        for ticket, incoming in [item for item in self._incoming.items() if item[1].peer == peer]:
            failure = (NodeLost.code, f"lost the link to {peer}")
            if incoming.state is State.REVOKING:
                failure = incoming.failure
            if incoming.state is State.GRANTED:
                # The grant may have reached a link that is newer than this loss.
                effects.append(Revoke(peer, ticket))
            effects += self._end_failed(ticket, incoming, *failure, now)
        return effects

    def tick(self, now: float) -> list[DestinationEffect]:
        """Run every timer that is due. Call it behind the events that have arrived, or a late look ends what lives."""
        effects: list[DestinationEffect] = [self._refuse_early(*key, now) for key in self._early.expired(now)]
        for ticket, incoming in list(self._incoming.items()):
            if incoming.state is State.REVOKING or now < incoming.deadline:
                continue
            code, message = LeaseExpired.code, f"{incoming.peer} has not renewed for {self._lease_s:g} s"
            if incoming.state is State.EXPECTED:
                code, message = TransferFailed.code, f"{incoming.peer} has not offered in {self._expect_timeout_s:g} s"
            effects += self._fail(ticket, incoming, code, message, now)
        return [*effects, *self._grant_again(now)]

    # ---- looking in ----

    @property
    def next_deadline(self) -> float | None:
        """When `tick` has something to do; None while nothing is waited for."""
        times = [item.deadline for item in self._incoming.values() if item.state is not State.REVOKING]
        times += [item.said_at + self._lease_s / 3 for item in self._incoming.values() if item.is_unheard]
        if self._early.next_deadline is not None:
            times.append(self._early.next_deadline)
        return min(times, default=None)

    def active(self) -> list[Ticket]:
        return list(self._incoming)

    def live_generations(self) -> list[int]:
        """Of every grant that has not ended: what a source gives under it may still be named by a push."""
        return [item.generation for item in self._incoming.values() if item.granted is not None]

    @property
    def num_early(self) -> int:
        return len(self._early)

    def check_invariants(self) -> None:
        """Raise AssertionError when the table contradicts itself: above all, when a block is granted to two tickets."""
        owner: dict[BlockId, Ticket] = {}
        for ticket, item in self._incoming.items():
            has_blocks = item.state in (State.GRANTED, State.REVOKING)
            assert has_blocks == (item.granted is not None) == (item.generation > 0), (ticket.hex(), item.state)
            assert (item.state is State.REVOKING) == bool(item.failure[0]), (ticket.hex(), item.failure)
            assert item.granted is None or all(
                item.granted.held <= ordinal < item.granted.stop for ordinal in item.digests
            ), ticket.hex()
            assert item.state is not State.GRANTED or item.done is None or not item.has_everything, ticket.hex()
            assert owner.keys().isdisjoint(item.own_blocks), ticket.hex()
            owner.update(dict.fromkeys(item.own_blocks, ticket))
        assert owner == self._owner

    # ---- inside ----

    def _mine(self, peer: WorkerKey, ticket: Ticket) -> Incoming | None:
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
        if incoming.state is not State.EXPECTED:
            self.stale += 1
            return []
        return self._offered(ticket, incoming, offer, now)

    def _offered(self, ticket: Ticket, incoming: Incoming, offer: Offer, now: float) -> list[DestinationEffect]:
        if not hmac.compare_digest(offer.proof, incoming.proof):
            self.stale += 1
            return []
        if offer.num_blocks != -(-offer.num_tokens // offer.block_size) or offer.reached > offer.num_blocks:
            message = f"offer of {offer.num_blocks} blocks, {offer.reached} reached, for {offer.num_tokens} tokens"
            return self._fail(ticket, incoming, TransferFailed.code, message, now)
        incoming.state, incoming.deadline = State.OFFERED, now + self._lease_s
        incoming.offer, incoming.reached = offer, offer.reached
        offered = Offered(ticket, offer.num_tokens, offer.num_blocks, offer.block_size, offer.reached)
        return [Renewing(incoming.peer, ticket, is_alive=True), offered]

    def _on_reached(self, peer: WorkerKey, message: Reached, now: float) -> list[DestinationEffect]:
        ticket = Ticket(message.ticket)
        incoming = self._mine(peer, ticket)
        if incoming is None:
            is_early = self._early.advance(peer, ticket, message.reached)
            return [] if is_early else self._not_mine(peer, ticket)
        if incoming.state not in (State.OFFERED, State.GRANTED):
            return []
        if not incoming.reached < message.reached <= incoming.num_blocks:
            return []  # it says again what is known
        incoming.reached = message.reached
        return [Advanced(ticket, message.reached)]

    def _on_done(self, peer: WorkerKey, done: Done, now: float) -> list[DestinationEffect]:
        ticket = Ticket(done.ticket)
        incoming = self._mine(peer, ticket)
        if incoming is None:
            return self._not_mine(peer, ticket)
        if incoming.state is not State.GRANTED or incoming.generation != done.generation or incoming.done is not None:
            self.stale += 1
            return []
        assert incoming.offer is not None
        assert incoming.granted is not None
        incoming.deadline = now + self._lease_s
        num_blocks = incoming.num_blocks - incoming.granted.held
        counts = (done.num_blocks, done.num_tokens, len(done.digests))
        wanted = (num_blocks, incoming.offer.num_tokens, num_blocks * DIGEST_BYTES)
        if counts != wanted:
            message = f"Done says (blocks, tokens, bytes of digests) = {counts}, granted {wanted}"
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
            if incoming is not None and incoming.state in (State.OFFERED, State.GRANTED):
                # After Done only blocks count: the source has nothing left to do but to send them.
                incoming.deadline = now + self._lease_s if incoming.done is None else incoming.deadline
            elif ended is not None and ended.peer == peer and now - ended.ended_at > self._lease_s / 10:
                # It should have heard by now: the word was lost, and its blocks wait for it.
                effects.append(SendMessage(peer, ended.last_word))
        return effects

    def _maybe_complete(self, ticket: Ticket, incoming: Incoming, now: float) -> list[DestinationEffect]:
        done, granted = incoming.done, incoming.granted
        if done is None or granted is None or not incoming.has_everything:
            return []
        ordinals = range(granted.held, granted.held + done.num_blocks)
        if b"".join(incoming.digests[ordinal] for ordinal in ordinals) != done.digests:
            return self._fail(ticket, incoming, ChecksumMismatch.code, "what came is not what Done speaks of", now)
        ack = Ack(ticket=ticket, generation=incoming.generation)
        received = Received(ticket, done, incoming.given)
        return [SendMessage(incoming.peer, ack), *self._end(ticket, incoming, ack, now), received]

    def _grant_again(self, now: float) -> list[DestinationEffect]:
        """Where nothing has come for a while: without it both sides would wait for ever."""
        effects: list[DestinationEffect] = []
        for ticket, incoming in self._incoming.items():
            if incoming.is_unheard and now >= incoming.said_at + self._lease_s / 3:
                incoming.said_at = now
                effects.append(SendMessage(incoming.peer, _grant(ticket, incoming)))
        return effects

    def _check_grant(self, ticket: Ticket, incoming: Incoming, granting: Granting) -> None:
        before, table = incoming.granted, granting.table
        least = before.stop if before is not None else granting.held
        fits = 0 <= granting.held <= least <= granting.stop <= incoming.num_blocks
        if not fits or (before is not None and (granting.held, granting.num_held) != (before.held, before.num_held)):
            raise InternalError(
                f"ticket {ticket.hex()}: {granting.held} held, up to {granting.stop} of {incoming.num_blocks}"
            )
        if before is not None and table[: len(before.table)] != before.table:
            raise InternalError(f"ticket {ticket.hex()}: a later grant names other blocks")
        fresh = table[len(before.table) if before is not None else granting.num_held :]
        if len(set(fresh)) != len(fresh) or not self._owner.keys().isdisjoint(fresh):
            raise InternalError(f"ticket {ticket.hex()}: a block is granted twice")

    def _fail(
        self, ticket: Ticket, incoming: Incoming, code: str, message: str, now: float, tell_peer: bool = True
    ) -> list[DestinationEffect]:
        """Leave the good path. Whoever fails first gives the reason."""
        if incoming.state is State.REVOKING:
            return []
        cancel = Cancel(ticket=ticket, code=safe_code(code), message=safe_text(message))
        tell: list[DestinationEffect] = [SendMessage(incoming.peer, cancel)] if tell_peer else []
        if incoming.state is State.GRANTED:
            incoming.state, incoming.failure = State.REVOKING, (cancel.code, cancel.message)
            return [Revoke(incoming.peer, ticket), *tell]
        return [*tell, *self._end_failed(ticket, incoming, cancel.code, cancel.message, now)]

    def _end_failed(
        self, ticket: Ticket, incoming: Incoming, code: str, message: str, now: float
    ) -> list[DestinationEffect]:
        cancel = Cancel(ticket=ticket, code=code, message=message)
        return [*self._end(ticket, incoming, cancel, now), ReceiveFailed(ticket, code, message)]

    def _end(self, ticket: Ticket, incoming: Incoming, last_word: Ack | Cancel, now: float) -> list[DestinationEffect]:
        del self._incoming[ticket]
        for block_id in incoming.own_blocks:
            del self._owner[block_id]
        self._remember(ticket, incoming.peer, last_word, now, was_expected=True)
        return [Renewing(incoming.peer, ticket, is_alive=False)] if incoming.offer is not None else []

    def _refuse_early(self, peer: WorkerKey, ticket: Ticket, now: float) -> SendMessage:
        cancel = Cancel(ticket=ticket, code=TransferFailed.code, message="nobody here expects this ticket")
        self._remember(ticket, peer, cancel, now, was_expected=False)
        return SendMessage(peer, cancel)

    def _remember(self, ticket: Ticket, peer: WorkerKey, word: Ack | Cancel, now: float, was_expected: bool) -> None:
        self._ended.add(ticket, Ended(peer, word, now, was_expected))


def _grant(ticket: Ticket, incoming: Incoming) -> Grant:
    granted = incoming.granted
    assert granted is not None
    return Grant(ticket=ticket, generation=incoming.generation, held=granted.held, stop=granted.stop)
