"""What clients have asked for lately: sums over a sliding window, in slots of a second."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields

WINDOW_S = 30.0
SLOT_S = 1.0


@dataclass(slots=True)
class Sums:
    """Of one slot, or of all. Arrivals are counted at the door, the rest when it is known."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_computed: int = 0  # prompts whose first token has come
    prefill_s: float = 0.0  # that these take on a worker with nothing else to do, by the fitted model
    transfer_s: float = 0.0
    num_answers: int = 0
    num_output_tokens: int = 0

    def add(self, other: Sums) -> None:
        for field in fields(Sums):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class OfferedLoad:
    """At most WINDOW_S / SLOT_S slots are kept."""

    def __init__(self) -> None:
        self._slots: deque[tuple[int, Sums]] = deque()
        self._since: float | None = None

    def note_request(self, num_prompt_tokens: int, now: float) -> None:
        slot = self._slot(now)
        slot.num_requests += 1
        slot.num_prompt_tokens += num_prompt_tokens

    def note_computed(self, prefill_s: float, transfer_s: float, now: float) -> None:
        """A prompt is computed and has come to where it is decoded."""
        slot = self._slot(now)
        slot.num_computed += 1
        slot.prefill_s += prefill_s
        slot.transfer_s += transfer_s

    def note_answer(self, num_output_tokens: int, now: float) -> None:
        slot = self._slot(now)
        slot.num_answers += 1
        slot.num_output_tokens += num_output_tokens

    def window(self, now: float) -> tuple[float, Sums]:
        """The span that the sums cover, in seconds, and the sums."""
        self._drop(now)
        total = Sums()
        for _, slot in self._slots:
            total.add(slot)
        since = now if self._since is None else self._since
        return min(WINDOW_S, now - since), total

    def _slot(self, now: float) -> Sums:
        if self._since is None:
            self._since = now
        number = int(now // SLOT_S)
        if not self._slots or self._slots[-1][0] != number:
            self._drop(now)
            self._slots.append((number, Sums()))
        return self._slots[-1][1]

    def _drop(self, now: float) -> None:
        while self._slots and (self._slots[0][0] + 1) * SLOT_S <= now - WINDOW_S:
            self._slots.popleft()
