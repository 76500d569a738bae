"""What waits for one of a link's sending threads: a bounded queue that a dead or stuck peer cannot make grow."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Outbox(Generic[T]):
    """FIFO of at most `limit` items between the threads that cause something and the one that sends it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self.closed = False

    def put(self, item: T) -> bool:
        """Queue an item; False when the queue is at its bound. After `close` items vanish."""
        with self._changed:
            if not self.closed and len(self._items) >= self._limit:
                return False
            if not self.closed:
                self._items.append(item)
                self._changed.notify()
            return True

    def drop(self, is_void: Callable[[T], bool]) -> None:
        """Take out what has lost its meaning."""
        with self._changed:
            self._items = deque(item for item in self._items if not is_void(item))

    def take(self, timeout_s: float | None = None) -> T | None:
        """The next item; None when the time is over or the outbox is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self.closed, timeout_s)
            return self._items.popleft() if self._items else None

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._items.clear()
            self._changed.notify_all()
