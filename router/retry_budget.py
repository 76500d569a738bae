"""How many attempts may be repeated, so that retries do not become the load that makes attempts fail.

Accepted requests and time fill the budget, each retry takes one from it (as in gRPC's retry throttling and Finagle's
retry budgets). Where it is empty a retry is not refused, it waits: nothing that was accepted is lost for it.
"""

from __future__ import annotations


class RetryBudget:
    """share: retries for each accepted request; per_s: and each second; at most `capacity` are saved up."""

    def __init__(self, now: float, share: float = 0.2, per_s: float = 10.0, capacity: float = 100.0) -> None:
        self._share, self._per_s, self._capacity = share, per_s, capacity
        self._left, self._seen = capacity, now

    def note_request(self) -> None:
        self._left = min(self._left + self._share, self._capacity)

    def take(self, now: float) -> float:
        """One retry; the seconds that it has to wait. Retries that wait queue up behind each other."""
        self._left = min(self._left + self._per_s * max(now - self._seen, 0.0), self._capacity) - 1
        self._seen = max(now, self._seen)
        return max(-self._left, 0.0) / self._per_s
