"""When not even to look for drafts: looking takes time too, in a large batch more than what it brings."""

from __future__ import annotations

from ...core.clock import Clock

_RATE = 0.3  # of the averages
_WORTH = 1.5  # what a draft is expected to save, at least, over what looking for it takes
_LONGEST = 16  # steps


class Pauses:
    """Averages of what drafting is expected to save and of what it takes; pauses double while it does not pay."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._saved = self._spent = 0.0
        self._length = self._left = 0
        self._began = 0.0

    def begin(self) -> bool:
        """Whether to look for drafts in this step; the time that this takes counts from now."""
        if self._left:
            self._left -= 1
            return False
        self._began = self._clock.now()
        return True

    def end(self, saved_s: float, drafting_s: float) -> None:
        """What was found is expected to save so many seconds in this step. A model took `drafting_s` to make it, which
        is weighed where models are asked.
        """
        spent_s = max(self._clock.now() - self._began - drafting_s, 0.0)
        self._saved += _RATE * (saved_s - drafting_s - self._saved)
        self._spent += _RATE * (spent_s - self._spent)
        if self._saved >= _WORTH * self._spent:
            self._length = 0
        else:
            self._length = min(max(1, 2 * self._length), _LONGEST)
        self._left = self._length
