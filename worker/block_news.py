"""Tells routers which prefix blocks can be found in this worker's cache: all of them at first, then what changes.

    WatchBlocks(watch) → BlockNews(watch, 1, everything) → BlockNews(watch, 2, changes) → …

A change that is undone before it is told is not told. What waits for a router is bounded: beyond that a number is left
out, so the router sees the gap and asks anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.block_names import block_name
from ..core.prefix_hash import BlockHash
from ..engine.block_pool import BlockPool
from ..protocol.messages import BlockNews

MAX_PENDING = 65536  # changed blocks that wait to be told to one router


@dataclass(slots=True)
class _Watch:
    """`pending`: name → whether it can be found now; None: everything is still to be told."""

    watch: int
    number: int = 0
    pending: dict[bytes, bool] | None = None


@dataclass(slots=True)
class BlockNewsDesk:
    """Hears of changes from the pool while some router wants to know of them. `secret` makes the names."""

    pool: BlockPool
    secret: bytes
    _watches: dict[str, _Watch] = field(default_factory=dict)  # by router

    def watch(self, router: str, watch: int) -> None:
        """Begin anew for this router; doubled and overtaken requests are ignored."""
        known = self._watches.get(router)
        if known is None or watch > known.watch:
            self._watches[router] = _Watch(watch)
            self.pool.listener = self

    def forget(self, router: str) -> None:
        self._watches.pop(router, None)
        if not self._watches:
            self.pool.listener = None

    def stored(self, block_hash: BlockHash) -> None:
        self._change(block_hash, is_there=True)

    def removed(self, block_hash: BlockHash) -> None:
        self._change(block_hash, is_there=False)

    def _change(self, block_hash: BlockHash, *, is_there: bool) -> None:
        name = block_name(self.secret, block_hash)
        for watch in self._watches.values():
            pending = watch.pending
            if pending is None:
                continue
            if pending.get(name, is_there) != is_there:
                del pending[name]  # undone
            elif len(pending) < MAX_PENDING:
                pending[name] = is_there
            else:
                pending.clear()
                watch.number += 1

    def take(self) -> list[tuple[str, BlockNews]]:
        """What is to be told now, and to which router."""
        return [(router, self._tell(watch)) for router, watch in self._watches.items() if watch.pending != {}]

    def _tell(self, watch: _Watch) -> BlockNews:
        pending = watch.pending
        if pending is None:
            pending = {block_name(self.secret, block_hash): True for block_hash in self.pool.published()}
        watch.number, watch.pending = watch.number + 1, {}
        stored = b"".join(name for name, is_there in pending.items() if is_there)
        removed = b"".join(name for name, is_there in pending.items() if not is_there)
        return BlockNews(watch.watch, watch.number, stored, removed)

    def told(self) -> dict[str, tuple[int, int]]:
        """Router → its watch, and the number of the last news for it."""
        return {router: (watch.watch, watch.number) for router, watch in self._watches.items()}
