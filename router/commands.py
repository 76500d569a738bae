"""The commands that start an attempt on its workers."""

from __future__ import annotations

from ..core.tickets import TicketFacts, prove
from ..protocol.messages import NO_PROOF, StartDecode, StartPrefill, pack_ids
from .requests import Attempt, RequestRecord


def proof_of(cluster_key: bytes, record: RequestRecord, attempt: Attempt, timeout_s: float) -> bytes:
    """Binds the ticket to this attempt, its two workers and its tokens."""
    if attempt.ticket is None or attempt.prefill is None:
        return NO_PROOF
    tokens = record.prompt_bytes + _output_bytes(record)
    facts = TicketFacts(attempt.ticket, attempt.prefill, attempt.decode, attempt.key, tokens, timeout_s)
    return prove(cluster_key, facts)


def start_decode(record: RequestRecord, attempt: Attempt, timeout_s: float, proof: bytes) -> StartDecode:
    return StartDecode(
        record.request_id,
        attempt.key.attempt,
        record.prompt_bytes,
        record.request.params,
        record.choice_states(),
        timeout_s,
        attempt.ticket,
        attempt.prefill.worker_id if attempt.prefill else None,
        attempt.prefill.epoch if attempt.prefill else None,
        record.request.cache_salt,
        proof,
    )


def start_prefill(record: RequestRecord, attempt: Attempt, timeout_s: float, proof: bytes) -> StartPrefill:
    assert attempt.ticket is not None
    assert not record.needs_local_prefill
    return StartPrefill(
        record.request_id,
        attempt.key.attempt,
        attempt.ticket,
        record.prompt_bytes,
        record.request.params,
        attempt.decode.worker_id,
        attempt.decode.epoch,
        timeout_s,
        _output_bytes(record),
        record.request.cache_salt,
        proof,
    )


def _output_bytes(record: RequestRecord) -> bytes:
    """What prefill computes behind the prompt: the tokens that a single choice already has."""
    return pack_ids(record.choices[0].output_ids) if record.request.params.n == 1 else b""
