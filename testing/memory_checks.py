"""What must not grow: the front with the requests it has served, its index with workers that come and go, a worker
with peers that have died. For `planted` and for tests; seconds, not hours.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from ..core.ids import SeededIds, WorkerKey
from ..engine.kv_memory import KVMemory
from ..kvtransfer.transports.shm import MappedPool, ShmBulk
from ..protocol.sampling import SamplingParams
from ..router.config import RouterConfig
from ..router.core import RouterCore
from ..router.interface import GenerateRequest
from ..router.prefix_index import PrefixIndex
from ..router.service import RouterService
from .clock import FakeClock
from .invariants import InvariantBroken

NUM_WARM, NUM_MORE = 4200, 300  # requests: the first fill what has a bound, the others must find room in it
MAX_GROWTH = 30  # elements, for the others together
NUM_PEERS = 20


def num_elements(root: object) -> int:
    """How many elements the containers hold that can be reached from `root` through our own objects."""
    total, seen, pending = 0, {id(root)}, [root]
    while pending:
        thing = pending.pop()
        children = _children(thing)
        if isinstance(thing, dict | list | set | deque | tuple):
            total += len(thing)
        for child in children:
            if id(child) not in seen:
                seen.add(id(child))
                pending.append(child)
    return total


def _children(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, list | set | deque | tuple):
        return list(thing)
    if not type(thing).__module__.startswith("penstock."):
        return []
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in slots)]


def check_router_memory() -> None:
    """I11: after thousands of requests the router is no larger than after thousands less."""
    clock = FakeClock()
    router = RouterCore(RouterConfig(), clock, SeededIds(0), b"")

    def serve(first: int, stop: int) -> None:
        for number in range(first, stop):
            name = f"r{number}"
            router.submit(GenerateRequest(name, [1, 2, 3], SamplingParams(max_tokens=1), 10.0))
            router.cancel(name)
            clock.advance(0.01)
            router.tick()

    serve(0, NUM_WARM)
    before = num_elements(router)
    serve(NUM_WARM, NUM_WARM + NUM_MORE)
    grown = num_elements(router) - before
    if grown > MAX_GROWTH:
        raise InvariantBroken(f"I11 router: {NUM_MORE} more requests leave {grown} elements behind")


def check_stream_memory() -> None:
    """I11: a caller that leaves at once, before its first event, leaves nothing behind."""
    asyncio.run(_cancel_at_once())


async def _cancel_at_once() -> None:
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        service = RouterService(RouterConfig(), f"ipc://{Path(folder) / 'router'}", clock=FakeClock(), ids=SeededIds(0))
        await service.start()
        try:
            for number in range(NUM_MORE):
                stream = service.submit(GenerateRequest(f"r{number}", [1], SamplingParams(max_tokens=1), 10.0))
                stream.cancel()
            kept = service.status().active_requests
        finally:
            await service.stop()
    if kept:
        raise InvariantBroken(f"I11 router: {kept} of {NUM_MORE} requests that were cancelled at once are kept")


def check_prefix_churn() -> None:
    """I11: the index knows no prefix that no worker holds."""
    rng, index = random.Random(0), PrefixIndex(max_blocks=4096)
    for generation in range(50):
        worker = WorkerKey("decode-0", f"{generation:016x}")
        for _ in range(10):
            index.insert([rng.randbytes(32) for _ in range(8)], worker)
        index.forget(worker)
        if len(index):
            raise InvariantBroken(f"I11 router: {len(index)} prefix blocks of workers that are gone stay in the index")


def check_peer_memory() -> None:
    """I8: a link that is over gives its peer's memory back."""
    mine = KVMemory(1, 1, 4096)
    before = _num_pools_mapped()
    for _ in range(NUM_PEERS):
        theirs = KVMemory(4, 1, 4096)
        descriptor = theirs.fileno()
        assert descriptor is not None  # where there is no memfd, no peer's memory is ever mapped
        bulk = ShmBulk(mine, MappedPool(os.dup(descriptor), theirs.nbytes))
        theirs.close()
        bulk.stop()
        bulk.close()
    left = _num_pools_mapped() - before
    mine.close()
    if left:
        raise InvariantBroken(f"I8 transport: the memory of {left} of {NUM_PEERS} dead peers stays mapped")


def _num_pools_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("penstock-kv")
