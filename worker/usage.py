"""What a worker's steps took, for how much and for whom."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

from ..core.errors import ServeError
from ..engine.interface import ScheduledSeq
from ..engine.sequence import Sequence
from ..protocol.messages import Phases, SampledToken
from .role import Computed


@dataclass(slots=True)
class Usage:
    """Sums since the worker's start. `begin` and `end` around each step; a begin without an end counts nothing."""

    busy_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    _began: float = 0.0

    def begin(self, now: float) -> None:
        self._began = now

    def end(
        self, entries: List[ScheduledSeq], results: List[tuple[SampledToken, ...] | ServeError], now: float
    ) -> None:
        """Before the roles commit: a sequence is still what it was when it was scheduled."""
        self.busy_s += now - self._began
        for entry, result in zip(entries, results, strict=True):
            if isinstance(result, ServeError):
                continue
            if entry.seq.is_prefilling:
                self.prefill_tokens += entry.num_new_tokens
            else:
                self.decode_tokens += len(result)


def note_chunks(computed: List[Computed], step_s: float) -> None:
    """Count a step for the prompts that it computed chunks of: wholly, and in part. Before they are advanced."""
    total = sum(entry.num_step_tokens for entry, _ in computed)
    for entry, _ in computed:
        if entry.seq.is_prefilling:
            entry.seq.compute_s += step_s
            entry.seq.work_s += step_s * entry.num_step_tokens / max(1, total)


def prefill_phases(seq: Sequence, step_s: float, now: float) -> Phases:
    """The phases of a prompt of which the last chunk was computed in the step of `step_s` that has just ended."""
    started = seq.first_scheduled if seq.first_scheduled is not None else now
    return Phases(
        queue_s=started - seq.arrival,
        prefill_s=now - started,
        compute_s=min(seq.compute_s, now - started),
        first_step_s=min(step_s, seq.compute_s, now - started),
        work_s=seq.work_s,
        cached_tokens=seq.num_cached_tokens,
    )
