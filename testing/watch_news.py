"""I13 for caches: what the router believes of a prefix cache that it follows is what its worker has told."""

from __future__ import annotations

from ..core.block_names import block_names
from ..router.core import RouterCore
from .invariants import InvariantBroken
from .sim_worker import SimWorker
from .tap import ROUTER


def check_known_blocks(router: RouterCore, workers: list[SimWorker]) -> None:
    """At rest. Where news were lost and are not yet asked for again, or the index has met its bound, nothing is due."""
    blocks = router._life.placer.blocks
    if blocks.index.num_dropped:
        return
    for worker in workers:
        desk = worker.core._news
        known = blocks._followed.get(worker.key)
        told = desk.told().get(ROUTER.worker_id)
        if known is None or told != (known.watch, known.number) or not known.number:
            continue
        untold = desk._watches[ROUTER.worker_id].pending or {}
        changed = {int.from_bytes(name, "little"): is_there for name, is_there in untold.items()}
        now_there = set(block_names(desk.secret, worker.pool.published()))
        expected = now_there - changed.keys() | {name for name, is_there in changed.items() if not is_there}
        bit = blocks.index._bits.get(worker.key, 0)
        found = {name for name, holders in blocks.index._holders.items() if holders & bit}
        if found != expected:
            raise InvariantBroken(
                f"I13 router: takes {len(found - expected)} blocks for cached on {worker.key} that are not, and misses "
                f"{len(expected - found)}"
            )
