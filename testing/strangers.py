"""Well-formed messages about tickets and requests that never were, for every party: none may matter (I9)."""

from __future__ import annotations

import random

from ..core.ids import WorkerKey
from ..protocol.messages import (
    NO_PROOF,
    Abort,
    Ack,
    AttemptFailed,
    Cancel,
    Done,
    Failed,
    FromRouter,
    FromWorker,
    Grant,
    HandoffMessage,
    Offer,
    Output,
    Phases,
    PrefillEnded,
    Push,
    Reached,
    Renew,
    SampledToken,
    Tokens,
    ToRouter,
)


def strange_handoff_message(rng: random.Random, num_layers: int) -> HandoffMessage:
    ticket, token = rng.randbytes(16), SampledToken(rng.randrange(1000))
    messages: list[HandoffMessage] = [
        Offer(ticket=ticket, num_tokens=9, num_blocks=3, block_size=4, reached=2, proof=NO_PROOF),
        Reached(ticket=ticket, reached=3),
        Grant(ticket=ticket, generation=rng.randrange(9), held=0, stop=3),
        Push(
            ticket=ticket,
            generation=rng.randrange(9),
            first_layer=0,
            num_layers=num_layers,
            ordinals=[0],
            digests=rng.randbytes(8),
            source_slots=[0],
        ),
        Done(
            ticket=ticket,
            generation=rng.randrange(9),
            num_blocks=3,
            num_tokens=9,
            first_tokens=(token,),
            phases=Phases(),
        ),
        Ack(ticket=ticket, generation=rng.randrange(9)),
        Cancel(ticket=ticket, code="cancelled", message="nobody asked for it"),
        Failed(ticket=ticket, code="transfer_failed", message="it never began"),
        Renew(tickets=[ticket]),
    ]
    # Offers are kept for a while, so they are the ones that may pile up.
    return messages[0] if rng.random() < 0.3 else rng.choice(messages)


def strange_report(rng: random.Random, key: WorkerKey) -> FromWorker:
    """A worker speaks of a request that the router has never had."""
    name, attempt = f"stranger-{rng.randrange(9)}", rng.randrange(1, 9)
    item = Tokens(name, attempt, 0, 0, (SampledToken(rng.randrange(1000)),))
    bodies: list[ToRouter] = [
        Output([item]),
        PrefillEnded(name, attempt, ok=rng.random() < 0.5, code="", message=""),
        AttemptFailed(name, attempt, "bad_request", "a stranger", retriable=False),
    ]
    return FromWorker(*key, rng.choice(bodies))


def strange_command(rng: random.Random, router_epoch: str) -> FromRouter:
    """An Abort for an attempt that the worker has never had. Number 0: it is not counted."""
    return FromRouter(router_epoch, 0, Abort(f"stranger-{rng.randrange(9)}", rng.randrange(1, 9)))
