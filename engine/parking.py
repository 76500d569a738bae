"""Host memory beside the block pool, where the KV of preempted sequences waits until they run again.

    park      blocks ──copied and digested──▶ places of the region, all of them or none
    unpark    places ──copied, the copy checked──▶ other blocks; the places are free again
    free      the sequence will not run again

One thread owns it together with the pool: a copy is complete when the call returns, so blocks may be freed after `park`
and read after `unpark`. Which sequences are parked is not decided here.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import xxhash

from ..core.clock import Clock
from ..core.errors import InternalError
from ..core.ids import AttemptKey, BlockId
from .kv_memory import KVMemory

log = logging.getLogger(__name__)


class SeqName(NamedTuple):
    """A sequence, as long as its attempt lives."""

    key: AttemptKey
    choice: int


class Copied(NamedTuple):
    """Bytes that went out or came back, and the time it took."""

    nbytes: int
    seconds: float


class ParkingSpace(Protocol):
    """What the decode scheduler needs of it."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def parked_bytes(self) -> int:
        """Bytes of all blocks parked now."""
        ...

    @property
    def num_corrupt(self) -> int:
        """Blocks so far that came back other than they went out."""
        ...

    def park(self, name: SeqName, block_ids: Sequence[BlockId]) -> bool:
        """Copy these blocks out under `name`; False (and nothing is copied) when there is no room for all."""
        ...

    def unpark(self, name: SeqName, first: int, block_ids: Sequence[BlockId]) -> int:
        """Copy what is parked from ordinal `first` on into `block_ids`, and forget `name`.

        Returns how many blocks are right, counted up to the first that is not.
        """
        ...

    def free(self, name: SeqName) -> None:
        """Forget `name`; nothing happens when it is not parked."""
        ...

    def take_copied(self) -> Copied:
        """What was copied since the last call."""
        ...

    def check_invariants(self, expected: Mapping[SeqName, int]) -> None:
        """Raise AssertionError unless exactly these sequences are parked, with so many blocks each."""
        ...


@dataclass(frozen=True, slots=True)
class _Parked:
    places: list[int]
    digests: list[int]


class Parking:
    """At most `capacity_bytes` of blocks of `memory`, in whole blocks. The region takes memory as it fills."""

    def __init__(self, memory: KVMemory, capacity_bytes: int, clock: Clock) -> None:
        self._memory, self._clock = memory, clock
        self._num_places = capacity_bytes // memory.block_bytes
        self._region = memoryview(mmap.mmap(-1, self._num_places * memory.block_bytes)) if self._num_places else None
        self._free = list(reversed(range(self._num_places)))  # a stack: what was freed last is warm
        self._parked: dict[SeqName, _Parked] = {}
        self._copied = Copied(0, 0.0)
        self.num_corrupt = 0

    @property
    def block_bytes(self) -> int:
        return self._memory.block_bytes

    @property
    def parked_bytes(self) -> int:
        return (self._num_places - len(self._free)) * self.block_bytes

    def park(self, name: SeqName, block_ids: Sequence[BlockId]) -> bool:
        """See ParkingSpace. Raises InternalError when `name` is parked already."""
        if name in self._parked:
            raise InternalError(f"sequence {name} is parked already")
        if len(block_ids) > len(self._free):
            return False
        begin = self._clock.now()
        places = [self._free.pop() for _ in block_ids]
        digests = [self._copy_out(block_id, place) for block_id, place in zip(block_ids, places, strict=True)]
        self._parked[name] = _Parked(places, digests)
        self._count(len(places), begin)
        return True

    def unpark(self, name: SeqName, first: int, block_ids: Sequence[BlockId]) -> int:
        """See ParkingSpace. Raises InternalError when `name` is not parked, or with fewer blocks than asked for."""
        parked = self._parked.get(name)
        if parked is None or (block_ids and first + len(block_ids) > len(parked.places)):
            blocks = "no blocks" if parked is None else f"{len(parked.places)} blocks"
            raise InternalError(f"sequence {name} has {blocks} parked, [{first}, {first + len(block_ids)}) are wanted")
        begin = self._clock.now()
        num_right = 0
        for ordinal, block_id in enumerate(block_ids, first):
            if not self._copy_back(parked.places[ordinal], block_id, parked.digests[ordinal]):
                self.num_corrupt += 1
                log.warning("sequence %s: its parked block %d is corrupt; it is computed again", name, ordinal)
                break
            num_right += 1
        self._count(num_right, begin)
        self.free(name)
        return num_right

    def free(self, name: SeqName) -> None:
        """See ParkingSpace."""
        parked = self._parked.pop(name, None)
        if parked is not None:
            self._free += reversed(parked.places)

    def take_copied(self) -> Copied:
        """See ParkingSpace."""
        copied, self._copied = self._copied, Copied(0, 0.0)
        return copied

    def views(self, name: SeqName) -> list[memoryview]:
        """The parked bytes of each block of `name`, for tests that spoil them."""
        return [self._place(place) for place in self._parked[name].places]

    def check_invariants(self, expected: Mapping[SeqName, int]) -> None:
        """See ParkingSpace. Also: every place is free or of one sequence."""
        found = {name: len(parked.places) for name, parked in self._parked.items()}
        assert found == expected, f"parked are {found}, and should be {dict(expected)}"
        places = sorted([*self._free, *(place for parked in self._parked.values() for place in parked.places)])
        assert places == list(range(self._num_places)), f"places {places} of {self._num_places}"

    def _place(self, place: int) -> memoryview:
        assert self._region is not None
        return self._region[place * self.block_bytes : (place + 1) * self.block_bytes]

    def _copy_out(self, block_id: BlockId, place: int) -> int:
        view = self._place(place)
        view[:] = self._memory.block(block_id)
        return _digest(view)

    def _copy_back(self, place: int, block_id: BlockId, digest: int) -> bool:
        block = self._memory.block(block_id)
        block[:] = self._place(place)
        return _digest(block) == digest

    def _count(self, num_blocks: int, begin: float) -> None:
        nbytes, seconds = self._copied
        self._copied = Copied(nbytes + num_blocks * self.block_bytes, seconds + self._clock.now() - begin)


def _digest(view: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(view)
