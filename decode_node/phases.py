"""Where the time to the first token went, as decode sees it."""

from __future__ import annotations

import msgspec

from ..engine.sequence import Sequence
from ..protocol.messages import Done, Phases


def local_phases(seq: Sequence, now: float) -> Phases:
    """The prompt was prefilled here."""
    started = seq.first_scheduled if seq.first_scheduled is not None else now
    return Phases(queue_s=started - seq.arrival, prefill_s=now - started, cached_tokens=seq.num_cached_tokens)


def received_phases(seq: Sequence, done: Done, block_bytes: int, now: float, num_given: int = 0) -> Phases:
    """The prompt was prefilled elsewhere. Both sides start their clocks with the same dispatch, so what prefill does
    not account for is the hand-off: offer, grant, bytes, verification. The bytes of `num_given` blocks have not moved.
    """
    transfer_s = max(0.0, now - seq.arrival - done.phases.queue_s - done.phases.prefill_s)
    return msgspec.structs.replace(
        done.phases,
        transfer_s=transfer_s,
        transferred_blocks=done.num_blocks,
        transferred_bytes=(done.num_blocks - num_given) * block_bytes,
        cached_tokens=max(done.phases.cached_tokens, seq.num_cached_tokens),
    )
