"""Parking as a simulated worker has it: the real one, watched, with copies that may be spoiled while they wait."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ..core.ids import BlockId
from ..engine.block_pool import BlockPool
from ..engine.kv_memory import KVMemory
from ..engine.parking import Copied, Parking, SeqName
from .journal import InvariantBroken


class SteppingClock:
    """Each reading is `step_s` after the one before, so whatever is timed with it takes `step_s`."""

    def __init__(self, step_s: float) -> None:
        self._step_s, self._now = step_s, 0.0

    def now(self) -> float:
        self._now += self._step_s
        return self._now


class SimParking:
    """Room for `num_blocks` blocks. `may_corrupt` says whether the next parked sequence is spoiled."""

    def __init__(
        self,
        memory: KVMemory,
        pool: BlockPool,
        num_blocks: int,
        copy_s: float,
        faults: Counter[str],
        may_corrupt: Callable[[], bool],
    ) -> None:
        self._parking = Parking(memory, num_blocks * memory.block_bytes, SteppingClock(copy_s))
        self._pool, self._faults, self._may_corrupt = pool, faults, may_corrupt
        self._rng = random.Random(0)

    @property
    def block_bytes(self) -> int:
        return self._parking.block_bytes

    @property
    def parked_bytes(self) -> int:
        return self._parking.parked_bytes

    @property
    def num_corrupt(self) -> int:
        return self._parking.num_corrupt

    def park(self, name: SeqName, block_ids: Sequence[BlockId]) -> bool:
        self._check_held(name, block_ids)
        is_parked = self._parking.park(name, block_ids)
        if is_parked and self._may_corrupt():
            self._faults["corrupt parked"] += 1
            view = self._rng.choice(self._parking.views(name))
            view[self._rng.randrange(len(view))] ^= 1 << self._rng.randrange(8)
        return is_parked

    def unpark(self, name: SeqName, first: int, block_ids: Sequence[BlockId]) -> int:
        self._check_held(name, block_ids)
        shared = [block_id for block_id in block_ids if self._pool.ref_count(block_id) > 1]
        if shared:
            raise InvariantBroken(f"I5 {name}: copied back into blocks {shared} that others hold too")
        return self._parking.unpark(name, first, block_ids)

    def free(self, name: SeqName) -> None:
        self._parking.free(name)

    def take_copied(self) -> Copied:
        return self._parking.take_copied()

    def check_invariants(self, expected: Mapping[SeqName, int]) -> None:
        self._parking.check_invariants(expected)

    def _check_held(self, name: SeqName, block_ids: Sequence[BlockId]) -> None:
        """I5: bytes are copied out before their blocks are freed, and back after their blocks are allocated."""
        freed = [block_id for block_id in block_ids if self._pool.ref_count(block_id) < 1]
        if freed:
            raise InvariantBroken(f"I5 {name}: copied out of or into blocks {freed}, which nobody holds")
