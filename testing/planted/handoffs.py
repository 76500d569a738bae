"""Bugs of the hand-off: its two tables, its links, its leases."""

from __future__ import annotations

from itertools import count
from typing import Any

from ...core.ids import Ticket
from ...kvtransfer.destination import DestinationTable
from ...kvtransfer.early import EarlyOffers
from ...kvtransfer.effects import Revoked, SendBlocks, SendMessage
from ...kvtransfer.incoming import State
from ...kvtransfer.source import SourceTable
from ...kvtransfer.transports import inproc
from ...kvtransfer.transports.inproc import InprocMesh, InprocNetwork
from ...prefill_node.role import PrefillRole
from ...protocol.messages import Abort, Done, Failed, Fingerprint, Phases, SampledToken
from ..lease_model import check_leases
from .bug import Bug, Check, Seeds, plants

CALM = range(0, 2000, 10)
ANY = range(1, 400)
LONG_S = 480.0


def confirm_and_write_on(original: Any) -> Any:
    def report(self: InprocMesh, event: Any) -> None:
        if isinstance(event, Revoked) and not self._closed:
            self.on_event(event)
        else:
            original(self, event)

    return report


def first_tokens_of_the_last(original: Any) -> Any:
    def seal(self: Any, ticket: Any, block_ids: Any, first_tokens: Any, phases: Any, now: float) -> Any:
        last, self.planted_last = getattr(self, "planted_last", first_tokens), first_tokens
        chosen = last if len(last) == len(first_tokens) else first_tokens
        return original(self, ticket, block_ids, chosen, phases, now)

    return seal


def failure_taken_for_done(original: Any) -> Any:
    def on_message(self: DestinationTable, peer: Any, message: Any, now: float) -> Any:
        incoming = self._incoming.get(Ticket(message.ticket)) if isinstance(message, Failed) else None
        if incoming is None or incoming.state is not State.GRANTED or incoming.granted is None:
            return original(self, peer, message, now)
        held, num_blocks = incoming.granted.held, incoming.num_blocks
        incoming.digests = {ordinal: bytes(8) for ordinal in range(held, num_blocks)}
        assert incoming.offer is not None
        incoming.done = Done(
            ticket=message.ticket,
            generation=incoming.generation,
            num_blocks=num_blocks - held,
            num_tokens=incoming.offer.num_tokens,
            first_tokens=(SampledToken(1),),
            phases=Phases(),
            digests=bytes(8 * (num_blocks - held)),
        )
        return self._maybe_complete(Ticket(message.ticket), incoming, now)

    return on_message


def granted_outlive_their_peer(original: Any) -> Any:
    def peer_lost(self: DestinationTable, peer: Any, now: float) -> Any:
        writing = (State.GRANTED, State.REVOKING)
        kept = {t: item for t, item in self._incoming.items() if item.peer == peer and item.state in writing}
        for ticket in kept:
            del self._incoming[ticket]
        effects = original(self, peer, now)
        self._incoming |= kept
        return effects

    return peer_lost


def long_lease(original: Any) -> Any:
    def init(self: SourceTable, lease_s: float, offer_timeout_s: float, *sizes: Any) -> None:
        original(self, LONG_S, LONG_S, *sizes)

    return init


def forget_silently(original: Any) -> Any:
    def expired(self: EarlyOffers, now: float) -> Any:
        original(self, now)
        return []

    return expired


def deaf_once_opened(original: Any) -> Any:
    def on_command(self: PrefillRole, message: Any, now: float, router: str) -> None:
        task = (
            next((t for k, t in self._tasks.items() if k == (message.request_id, message.attempt, router)), None)
            if (isinstance(message, Abort))
            else None
        )
        if task is None or not task.opened:
            original(self, message, now, router)

    return on_command


def late_arrival_asserts(original: Any) -> Any:
    def on_arrived(self: DestinationTable, event: Any, now: float) -> Any:
        incoming = self._incoming.get(event.ticket)
        assert incoming is not None, "it is gone"
        assert incoming.state is State.GRANTED, "it is received and given up at once"
        return original(self, event, now)

    return on_arrived


def wait_for_ever(original: Any) -> Any:
    def grant(self: DestinationTable, ticket: Any, granting: Any, now: float) -> Any:
        effects = original(self, ticket, granting, now)
        self._incoming[ticket].deadline = float("inf")
        return effects

    return grant


def some_never_leave(original: Any) -> Any:
    number = count()

    def perform(self: InprocMesh, effect: Any) -> None:
        link = self._links.get(effect.peer)
        if isinstance(effect, SendBlocks) and link is not None and next(number) % 5 == 4:
            link.vouchers.note(self._push(effect))
        else:
            original(self, effect)

    return perform


def stop_at_the_first_alive(original: Any) -> Any:
    def tick(self: SourceTable, now: float) -> Any:
        everything, due = self._outgoing, {}
        for ticket, out in everything.items():
            if now < out.lease_until and (out.answer_until is None or now < out.answer_until):
                break
            due[ticket] = out
        self._outgoing = dict(due)
        effects = original(self, now)
        left = self._outgoing
        self._outgoing = {t: out for t, out in everything.items() if t not in due or t in left}
        return effects

    return tick


def orphan_timer_on_open(original: Any) -> Any:
    def opened(self: Any, ticket: Any, peer: Any, plan: Any, now: float) -> Any:
        self.planted_timers = {**getattr(self, "planted_timers", {}), ticket: now + LONG_S}
        return original(self, ticket, peer, plan, now)

    return opened


def orphan_timer_on_tick(original: Any) -> Any:
    def tick(self: Any, now: float) -> Any:
        for ticket, due in getattr(self, "planted_timers", {}).items():
            assert now < due or ticket in self._outgoing, "a request that was freed by force"
        return original(self, now)

    return tick


def any_pool_of_the_host(original: Any) -> Any:
    def move(self: InprocNetwork, source: Any, target: Any, *rest: Any) -> None:
        beside = next(mesh for mesh in self._meshes.values() if mesh.role == source.role)
        original(self, beside, target, *rest)

    return move


def weights_left_out(original: Any) -> Any:
    def init(self: InprocMesh) -> None:
        facts = {name: getattr(self.fingerprint, name) for name in self.fingerprint.__struct_fields__}
        self.fingerprint = Fingerprint(**(facts | {"weights": ""}))
        original(self)

    return init


def tell_nobody(original: Any) -> Any:
    def give_up(self: SourceTable, *args: Any, **kwargs: Any) -> Any:
        effects = original(self, *args, **kwargs)
        return [e for e in effects if not (isinstance(e, SendMessage) and isinstance(e.message, Failed))]

    return give_up


def without_bound(original: Any) -> Any:
    def add(self: EarlyOffers, peer: Any, offer: Any, now: float) -> Any:
        self._limit = 1 << 30
        return original(self, peer, offer, now)

    return add


HANDOFF_BUGS = [
    Bug(
        "1",
        "sglang#24527",
        "decode aborts, and its blocks are used again while prefill still writes into them",
        plants((InprocMesh, "report", confirm_and_write_on)),
        Seeds("I5", ANY),
    ),
    Bug(
        "2",
        "sglang#17259, #22716",
        "the first token is that of whoever used the same metadata buffer before",
        plants((SourceTable, "seal", first_tokens_of_the_last)),
        Seeds("I7", CALM),
    ),
    Bug(
        "3",
        "sglang#23020",
        "bytes that were damaged on the way are taken for good",
        plants((inproc, "corrupt_ordinals", lambda original: lambda push, found: [])),
        Seeds("I6", ANY),
    ),
    Bug(
        "4",
        "sglang#30233",
        "prefill gives a prompt up, and decode goes on with what it has of the KV",
        plants((DestinationTable, "on_message", failure_taken_for_done)),
        Seeds("I6", ANY),
    ),
    Bug(
        "7",
        "sglang#39428",
        "every unknown ticket that is offered stays in memory",
        plants((EarlyOffers, "add", without_bound)),
        Seeds("I11", ANY),
    ),
    Bug(
        "13",
        "vllm#46283, #46289",
        "decode waits for the link to confirm a revocation, and the link is gone with prefill",
        plants((DestinationTable, "peer_lost", granted_outlive_their_peer)),
        Seeds("I8", ANY),
    ),
    Bug(
        "14",
        "vllm#41269",
        "decode refuses before admission and tells nobody; prefill holds its blocks for 480 s",
        plants(
            (SourceTable, "__init__", long_lease),
            (EarlyOffers, "expired", forget_silently),
            (PrefillRole, "on_command", deaf_once_opened),
        ),
        Seeds("I8", ANY),
    ),
    Bug(
        "15",
        "vllm#46240, #56089, #43226",
        "blocks that arrive while their hand-off is given up trip an assertion",
        plants((DestinationTable, "on_arrived", late_arrival_asserts)),
        Seeds("I9", ANY),
    ),
    Bug(
        "16",
        "vllm#35943",
        "decode's wait for granted blocks has no end",
        plants((DestinationTable, "grant", wait_for_ever)),
        Check("I8", check_leases),
    ),
    Bug(
        "17",
        "vllm#50754",
        "a write cannot be posted, nobody is told, and decode counts to a number that never comes",
        plants((InprocMesh, "perform", some_never_leave)),
        Seeds("I6", ANY),
    ),
    Bug(
        "27",
        "vllm#23587",
        "two workers with different weights take each other for equal",
        plants(
            (Fingerprint, "difference", lambda original: lambda self, other: None),
            (InprocMesh, "__post_init__", weights_left_out),
        ),
        Seeds("I6", ANY),
    ),
    Bug(
        "30",
        "dynamo#8379",
        "the 480 s timer of a hand-off outlives it and finds it gone",
        plants((SourceTable, "open", orphan_timer_on_open), (SourceTable, "tick", orphan_timer_on_tick)),
        Seeds("I9", ANY),
    ),
    Bug(
        "34",
        "Mooncake PR#1995, sglang#26326",
        "two workers on one host are taken for one process, and the wrong one's memory is read",
        plants((InprocNetwork, "move", any_pool_of_the_host)),
        Seeds("I14", CALM),
    ),
    Bug(
        "37",
        "vLLM's notes on NIXL leases",
        "the sweep over the leases stops at the first that is still alive",
        plants((SourceTable, "tick", stop_at_the_first_alive)),
        Check("I8", check_leases),
    ),
    Bug(
        "lose-failed",
        "of our own",
        "a hand-off ends at its source, and nobody tells decode",
        plants((SourceTable, "_give_up", tell_nobody)),
        Seeds("I8", ANY),
    ),
]
