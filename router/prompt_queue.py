"""Prompts that were sent to one worker and are not computed yet, with the seconds that each is predicted to take."""

from __future__ import annotations

from ..core.ids import AttemptKey


class PromptQueue:
    """First come, first served, as the worker computes them. `num_prompts`: how many wait or are being computed."""

    __slots__ = ("_busy_s", "_busy_since", "_head_since", "_seconds", "_total_s", "num_prompts", "others_s")

    def __init__(self) -> None:
        self.num_prompts = 0
        self._seconds: dict[AttemptKey, float] = {}
        self._total_s = 0.0
        self._head_since = 0.0
        self._busy_since = 0.0
        self._busy_s = 0.0
        self.others_s = 0.0  # what other routers have sent there, as of its last heartbeat

    def __len__(self) -> int:
        return self.num_prompts

    def add(self, key: AttemptKey, seconds: float, now: float) -> None:
        if not self._seconds:
            self._head_since = self._busy_since = now
            self._total_s = 0.0
        self._seconds[key] = seconds
        self._total_s += seconds
        self.num_prompts = len(self._seconds)

    def remove(self, key: AttemptKey, now: float) -> None:
        """Computed, or given up. Unknown ones are ignored."""
        seconds = self._seconds.pop(key, None)
        if seconds is not None:
            self._total_s -= seconds
            self._head_since = now
            self.num_prompts = len(self._seconds)
            if not self._seconds:
                self._busy_s += now - self._busy_since

    def busy_s(self, now: float) -> float:
        """For how long there has been something to compute, since the start."""
        return self._busy_s + (now - self._busy_since if self._seconds else 0.0)

    def wait_s(self, now: float) -> float:
        """Until a prompt that comes now would begin. What overruns its prediction is expected to end at once."""
        if not self._seconds:
            return self.others_s
        head_s = next(iter(self._seconds.values()))
        return self.others_s + max(0.0, self._total_s - min(max(0.0, now - self._head_since), head_s))
