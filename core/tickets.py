"""Tickets: who may hand what over to whom. Issued by the router, checked by both workers.

A ticket is 16 random bytes, used once. Its proof is a MAC with the cluster's key over everything it stands for, so a
ticket that is taken elsewhere, to another worker, request, prompt or time, is worth nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from .errors import ProtocolError
from .ids import AttemptKey, Ticket, WorkerKey

PROOF_BYTES = 16


@dataclass(frozen=True, slots=True)
class TicketFacts:
    """What a ticket is bound to. `timeout_s` counts from each side's receipt: no clock is shared between hosts."""

    ticket: Ticket
    source: WorkerKey
    destination: WorkerKey
    attempt: AttemptKey
    tokens: bytes  # prompt and output ids, as they travel: they name the blocks
    timeout_s: float


def prove(key: bytes, facts: TicketFacts) -> bytes:
    """The proof that goes with the ticket."""
    mac = hashlib.blake2b(key=key, digest_size=PROOF_BYTES, person=b"penstock ticket")
    parts = (facts.ticket, *facts.source, *facts.destination, facts.attempt.request_id)
    for part in (*parts, str(facts.attempt.attempt), facts.timeout_s.hex(), facts.tokens):
        data = part.encode() if isinstance(part, str) else part
        mac.update(len(data).to_bytes(8, "little") + data)
    return mac.digest()


def is_proven(key: bytes, facts: TicketFacts, proof: bytes) -> bool:
    """Whether `proof` was made with `key` for exactly these facts; takes the same time for every wrong proof."""
    return hmac.compare_digest(prove(key, facts), proof)


def check_proof(key: bytes, facts: TicketFacts, proof: bytes) -> None:
    """Raise ProtocolError unless the proof was made with `key` for exactly these facts."""
    if not is_proven(key, facts, proof):
        raise ProtocolError("the ticket was not made for this; are all processes of this cluster using one key?")
