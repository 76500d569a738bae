"""What a ticket's proof is bound to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from penstock.core.ids import AttemptKey, Ticket, WorkerKey
from penstock.core.tickets import PROOF_BYTES, TicketFacts, is_proven, prove

KEY = b"k" * 32
FACTS = TicketFacts(
    Ticket(b"t" * 16),
    WorkerKey("prefill-0", "a" * 16),
    WorkerKey("decode-0", "d" * 16),
    AttemptKey("request-7", 2),
    b"\x01\x00\x00\x00\x02\x00\x00\x00",
    30.0,
)


def test_proof_holds_for_exactly_these_facts_and_this_key() -> None:
    proof = prove(KEY, FACTS)
    assert len(proof) == PROOF_BYTES
    assert is_proven(KEY, FACTS, proof)
    assert prove(KEY, replace(FACTS)) == proof
    assert not is_proven(b"K" * 32, FACTS, proof)
    assert not is_proven(b"", FACTS, proof)


@pytest.mark.parametrize(
    "changes",
    [
        {"ticket": Ticket(b"u" * 16)},
        {"source": WorkerKey("prefill-1", "a" * 16)},
        {"source": WorkerKey("prefill-0", "b" * 16)},
        {"destination": WorkerKey("decode-1", "d" * 16)},
        {"destination": WorkerKey("decode-0", "e" * 16)},
        {"source": FACTS.destination, "destination": FACTS.source},
        {"attempt": AttemptKey("request-8", 2)},
        {"attempt": AttemptKey("request-7", 3)},
        {"tokens": FACTS.tokens + b"\x03\x00\x00\x00"},
        {"tokens": FACTS.tokens[4:] + FACTS.tokens[:4]},
        {"tokens": b""},
        {"timeout_s": 30.000001},
        {"timeout_s": 3.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_fact_that_changes_takes_the_proof_away(changes: dict[str, Any]) -> None:
    assert not is_proven(KEY, replace(FACTS, **changes), prove(KEY, FACTS))


def test_facts_that_read_the_same_in_one_row_are_told_apart() -> None:
    """What ends one field cannot begin the next."""
    one = replace(FACTS, attempt=AttemptKey("r1", 2), source=WorkerKey("ab", "c"), destination=WorkerKey("de", "f"))
    others = [
        replace(one, attempt=AttemptKey("r", 12)),
        replace(one, source=WorkerKey("a", "bc")),
        replace(one, source=WorkerKey("ab", "cd"), destination=WorkerKey("e", "f")),
        replace(one, destination=WorkerKey("de", "fr"), attempt=AttemptKey("1", 2)),
    ]
    assert len({prove(KEY, facts) for facts in (one, *others)}) == 1 + len(others)


@pytest.mark.parametrize("proof", [b"", bytes(16), b"x" * 15, b"x" * 17])
def test_proof_of_any_other_form_is_refused(proof: bytes) -> None:
    assert not is_proven(KEY, FACTS, proof)


def test_each_flipped_bit_of_a_proof_is_noticed() -> None:
    proof = bytearray(prove(KEY, FACTS))
    for bit in range(8 * len(proof)):
        proof[bit // 8] ^= 1 << bit % 8
        assert not is_proven(KEY, FACTS, bytes(proof))
        proof[bit // 8] ^= 1 << bit % 8
