"""Where the time to the first token went, and to those after it, as decode sees it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ..engine.sequence import Sequence
from ..protocol.messages import Done, Phases, StepTime
from ..worker.role import Computed
from ..worker.usage import note_chunks

PLAIN_WEIGHT = 0.2  # of the newest step in what a step without prompts takes


def received_phases(
    seq: Sequence, done: Done, block_bytes: int, now: float, granted_at: float | None = None, num_given: int = 0
) -> Phases:
    """The prompt was prefilled elsewhere. Both sides start their clocks with the same dispatch, so what prefill does
    not account for is the hand-off: room, bytes, verification. `granted_at`: when there was room for all of it.
    The bytes of `num_given` blocks have not moved.
    """
    prefill_s = done.phases.queue_s + done.phases.prefill_s
    transfer_s = max(0.0, now - seq.arrival - prefill_s)
    room_s = 0.0 if granted_at is None else granted_at - seq.arrival - prefill_s
    return msgspec.structs.replace(
        done.phases,
        transfer_s=transfer_s,
        room_s=min(transfer_s, max(0.0, room_s)),
        transferred_blocks=done.num_blocks,
        transferred_bytes=(done.num_blocks - num_given) * block_bytes,
        cached_tokens=max(done.phases.cached_tokens, seq.num_cached_tokens),
    )


@dataclass(slots=True)
class StepClock:
    """How long a decode step takes, how much of that goes to prompts in it, and how long sequences wait for it."""

    step_s: float = 0.0
    prompts_s: float = 0.0
    _began: float = 0.0
    _plain_s: float | None = None  # of late, without prompts
    _is_over: bool = False  # a step has ended, and its tokens are being told

    def begin(self, now: float) -> None:
        self._began = now

    def end(self, computed: list[Computed], now: float) -> None:
        """Before the sequences are advanced."""
        self.step_s, self.prompts_s, self._is_over = now - self._began, 0.0, bool(computed)
        note_chunks(computed, self.step_s)
        if any(entry.seq.is_prefilling for entry, _ in computed):
            self.prompts_s = max(0.0, self.step_s - self._plain_part(computed))
        elif computed:
            before = self.step_s if self._plain_s is None else self._plain_s
            self._plain_s = before + PLAIN_WEIGHT * (self.step_s - before)

    def _plain_part(self, computed: list[Computed]) -> float:
        """What this step would have taken without prompts; by tokens as long as no such step is known."""
        if self._plain_s is not None:
            return self._plain_s
        plain = sum(entry.num_step_tokens for entry, _ in computed if not entry.seq.is_prefilling)
        return self.step_s * plain / max(1, sum(entry.num_step_tokens for entry, _ in computed))

    def forget(self) -> None:
        """All its tokens are told."""
        self._is_over = False

    def told(self) -> StepTime | None:
        """The step whose tokens are told now; None for tokens that come with a hand-off."""
        return StepTime(self.step_s, self.prompts_s) if self._is_over else None

    def wait_s(self, seq: Sequence, now: float) -> float:
        """From the tokens of `seq` before to the step that drew these, which are told at `now`."""
        before, seq.told_at = seq.told_at, now
        return max(0.0, self._began - before) if before is not None and self._is_over else 0.0
