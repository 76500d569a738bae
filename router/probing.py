"""Trying what has not been tried for long: a way that nobody takes is known by its prior, or by how it was long ago.

There are two ways to prefill: where it decodes, and elsewhere. When one has not been taken for `PATIENCE` decisions in
which it was possible, it is taken once, even if the model says that it costs more; but all that was spent so stays
within `SHARE` of what decisions were expected to cost in all, so what trying costs is bounded. While the other way
stays the better one, each try waits twice as long as the one before.
"""

from __future__ import annotations

from .options import Choice

PATIENCE = 32  # decisions
MAX_PATIENCE = 1024
SHARE = 0.02
Way = bool  # whether the prompt is handed over
Best = tuple[float, Choice | None]  # what the cheapest choice of a way costs, in seconds


class Probing:
    """Counts decisions between two ways; draws nothing at random."""

    def __init__(self) -> None:
        self.num_probes = 0
        self._saved_s = 0.0
        self._idle = {False: 0, True: 0}  # decisions since each way was taken
        self._patience = {False: PATIENCE, True: PATIENCE}

    def due(self) -> Way | None:
        """The way that should be tried, if its cost can be afforded; None: neither."""
        for way in (False, True):
            if self._idle[way] >= self._patience[way]:
                return way
        return None

    def choose(self, pair: Best, stay: Best) -> Choice:
        """One of two choices, of which there is at least one. What stays is taken only where it costs less."""
        if pair[1] is None or stay[1] is None:
            found = pair[1] or stay[1]
            assert found is not None
            if pair[1] is not None:
                self._count(True, pair[0])
            return found
        best = pair[0] <= stay[0]
        return pair[1] if self.decide(best, min(pair[0], stay[0]), max(pair[0], stay[0])) else stay[1]

    def decide(self, best: Way, best_s: float, other_s: float) -> Way:
        """Which way to take, where the best costs `best_s` and the other one `other_s`."""
        other, extra_s = not best, other_s - best_s
        is_probe = self.due() is other and extra_s <= self._saved_s
        taken = other if is_probe else best
        if is_probe:
            self.num_probes += 1
            self._saved_s -= extra_s
            self._patience[other] = min(2 * self._patience[other], MAX_PATIENCE)
        else:
            self._patience[best] = PATIENCE
        self._count(taken, best_s)
        return taken

    def _count(self, taken: Way, cost_s: float) -> None:
        self._saved_s += SHARE * cost_s
        self._idle[taken], self._idle[not taken] = 0, self._idle[not taken] + 1
