"""The two commands that start an attempt, made of what the router knows of its request."""

from __future__ import annotations

from ..protocol.messages import StartDecode, StartPrefill, pack_ids
from .requests import Attempt, RequestRecord


def output_bytes(record: RequestRecord) -> bytes:
    """What prefill computes behind the prompt: the tokens that a single choice already has."""
    return pack_ids(record.choices[0].output_ids) if record.request.params.n == 1 else b""


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
        output_bytes(record),
        record.request.cache_salt,
        proof,
    )
