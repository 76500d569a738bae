"""When not even to look for drafts: looking takes time too, in a large batch more than what it brings."""

from __future__ import annotations

from ...core.clock import Clock

_LOOKS = 4  # are judged together: one alone says little of whether the next one pays
_KEPT = 0.5  # of what was judged, for the next time
_WORTH = 1.5  # what drafts are expected to save, at least, over what looking for them takes
_SHORTEST, _LONGEST = 4, 16  # steps of a pause


class Pauses:
    """What some looks are expected to save, beside what they take; pauses double while they do not pay."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._saved = self._spent = 0.0
        self._looks = self._length = self._left = 0
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
        self._spent += max(self._clock.now() - self._began - drafting_s, 0.0)
        self._saved += saved_s - drafting_s
        self._looks += 1
        if self._looks < _LOOKS:
            return
        pays = self._saved >= _WORTH * self._spent
        self._length = 0 if pays else min(max(_SHORTEST, 2 * self._length), _LONGEST)
        self._left = self._length
        self._saved, self._spent, self._looks = self._saved * _KEPT, self._spent * _KEPT, 0
