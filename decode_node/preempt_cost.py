"""What it costs to bring a preempted sequence back: copying its KV out and in again, or computing it again.

Both rates are measured while the worker runs, and fade: a rate that nothing has fed for a while counts as unknown, so
one bad measurement does not decide for ever. Pure: durations and the time are passed in.
"""

from __future__ import annotations

FADE = 0.8  # weight of all earlier samples against the newest one
STALE_S = 60.0


class Rate:
    """Units per second over the recent past: the ratio of two sums that fade, so long samples weigh more."""

    def __init__(self) -> None:
        self._units = self._seconds = 0.0
        self._fed_at: float | None = None

    def note(self, units: float, seconds: float, now: float) -> None:
        """One more sample; without units or without time it says nothing."""
        if units <= 0 or seconds <= 0:
            return
        fade = 0.0 if self.per_s(now) is None else FADE
        self._units, self._seconds = fade * self._units + units, fade * self._seconds + seconds
        self._fed_at = now

    def per_s(self, now: float) -> float | None:
        """None while nothing was measured in the last STALE_S seconds."""
        if self._fed_at is None or now - self._fed_at > STALE_S:
            return None
        return self._units / self._seconds


class PreemptCost:
    """Decides between parking and computing again, by the rates of this worker."""

    def __init__(self) -> None:
        self.copying = Rate()  # bytes, either way
        self.prefill = Rate()  # tokens, in steps that mostly prefill
        self.prefill_elsewhere = Rate()  # tokens, by what prefill workers report; used until this one knows its own

    def prefers_parking(self, num_bytes: int, num_tokens: int, now: float) -> bool:
        """Moving `num_bytes` (both ways together) takes no longer than computing `num_tokens`.

        With a rate unknown the answer is yes: a copy through memory is the cheaper one unless shown otherwise, and
        parking is what measures it.
        """
        if num_tokens <= 0:
            return False
        copying = self.copying.per_s(now)
        prefill = self.prefill.per_s(now) or self.prefill_elsewhere.per_s(now)
        if copying is None or prefill is None:
            return True
        return num_bytes / copying <= num_tokens / prefill
