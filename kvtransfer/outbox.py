"""What waits for a link's writer thread: a bounded queue that a dead or stuck peer cannot make grow."""

from __future__ import annotations

import threading
from collections import deque

from ..core.ids import Ticket
from ..protocol.messages import Done, Failed, HandoffMessage
from .effects import SendBlocks

OutItem = HandoffMessage | SendBlocks


class Outbox:
    """FIFO of at most `limit` items between the worker's thread and the writer."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[OutItem] = deque()
        self._changed = threading.Condition()
        self.closed = False

    def put(self, item: OutItem) -> bool:
        """Queue an item; False when the queue is at its bound. After `close` items vanish.

        Failed overtakes the queued blocks and Done of its ticket: those blocks belong to somebody else from now on, and
        a Done behind them would vouch for the wrong bytes.
        """
        with self._changed:
            if isinstance(item, Failed):
                self._items = deque(other for other in self._items if not _vouches_for(other, Ticket(item.ticket)))
            if not self.closed and len(self._items) >= self._limit:
                return False
            if not self.closed:
                self._items.append(item)
                self._changed.notify()
            return True

    def take(self, timeout_s: float) -> OutItem | None:
        """The next item; None when the time is over or the outbox is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self.closed, timeout_s)
            return self._items.popleft() if self._items else None

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._items.clear()
            self._changed.notify_all()


def _vouches_for(item: OutItem, ticket: Ticket) -> bool:
    return isinstance(item, SendBlocks | Done) and item.ticket == ticket
