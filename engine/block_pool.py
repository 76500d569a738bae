"""Who owns which block of the KV cache, and which computed blocks may be found again.

    free ──allocate──▶ referenced ──free, published──▶ cached (unreferenced, findable) ──evicted──▶ referenced
      ▲                  │    ▲                           │
      └──free, unpublished    └────────acquire────────────┘
    adopt ▶ free, adopt_held ▶ referenced                surrender: referenced once ▶ gone

A block is in exactly one of the three places, or not in this pool: where workers of one host share a memory, blocks
change hands between their pools (`kvtransfer.ownership`), and a pool's ids and their number change while it runs. A
published block is found by its hash while referenced too, so sequences that run at the same time share it. Every
allocation gives a block its next generation: whoever still names an older one (a late push, an old grant) is refused.
Pure bookkeeping: no tensors, no clock, no randomness. One thread owns a pool.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from ..core.errors import InternalError, Overloaded
from ..core.ids import BlockId
from ..core.prefix_hash import BlockHash
from .sequence import blocks_for


class PoolListener(Protocol):
    """Hears what becomes findable by its hash, and what no longer is."""

    def stored(self, block_hash: BlockHash) -> None: ...

    def removed(self, block_hash: BlockHash) -> None: ...


class OutOfBlocks(Overloaded):
    """The pool cannot give that many blocks now. Nothing was taken."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. With the prefix cache off, nothing is ever found or retained."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_cache: bool = True) -> None:
        self.block_size, self.enable_prefix_cache = block_size, enable_prefix_cache
        self.listener: PoolListener | None = None
        # A stack: what was freed last is warm in the processor's caches.
        self._free: list[BlockId] = []
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # unreferenced and findable, least recently used first
        self._ref_counts: dict[BlockId, int] = {}  # of every block in the pool
        self._generations: dict[BlockId, int] = {}  # outlives a block's stay: one that returns goes on counting
        self._block_of: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}
        self.adopt(map(BlockId, range(num_blocks)))

    @classmethod
    def of(cls, block_ids: Iterable[BlockId], block_size: int, *, enable_prefix_cache: bool = True) -> BlockPool:
        """A pool over these blocks, all free."""
        pool = cls(0, block_size, enable_prefix_cache=enable_prefix_cache)
        pool.adopt(block_ids)
        return pool

    @property
    def num_blocks(self) -> int:
        """Blocks in this pool now."""
        return len(self._ref_counts)

    def block_ids(self) -> list[BlockId]:
        """Every block in this pool, ascending."""
        return sorted(self._ref_counts)

    def __contains__(self, block_id: BlockId) -> bool:
        return block_id in self._ref_counts

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Findable blocks that nobody references."""
        return len(self._cached)

    def ref_count(self, block_id: BlockId) -> int:
        return self._ref_counts[block_id]

    def is_published(self, block_id: BlockId) -> bool:
        """The block can be found by its hash."""
        return block_id in self._hash_of

    def published(self) -> list[BlockHash]:
        """The hash of every block that can be found."""
        return list(self._block_of)

    def generation(self, block_id: BlockId) -> int:
        """How often the block was allocated. 0 means never."""
        return self._generations[block_id]

    def match_prefix(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """Blocks of the longest run of leading hashes that are in the cache.

        Takes no reference: `acquire` the blocks before the next `allocate`, or it may evict them.
        """
        found: list[BlockId] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def acquire(self, block_ids: Iterable[BlockId]) -> None:
        """One more reference on each block. Only referenced and cached blocks have something worth sharing."""
        for block_id in block_ids:
            if self._ref_counts.get(block_id, 0) == 0:
                if block_id not in self._cached:
                    raise InternalError(f"block {block_id} is free; only referenced or cached blocks can be acquired")
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= self.num_free_blocks

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """`num_blocks` blocks with one reference each, in ascending order so that neighbours travel as one copy.

        Free blocks go first, then the least recently used cached ones, which stop being findable. Raises OutOfBlocks.
        """
        if not self.can_allocate(num_blocks):
            raise OutOfBlocks(f"needs {num_blocks} blocks, {self.num_free_blocks} free")
        num_left = max(len(self._free) - num_blocks, 0)
        taken = self._free[num_left:]
        del self._free[num_left:]
        taken += [self._evict_oldest() for _ in range(num_blocks - len(taken))]
        for block_id in taken:
            self._ref_counts[block_id] = 1
            self._generations[block_id] += 1
        return sorted(taken)

    def grow(self, table: list[BlockId], num_tokens: int) -> bool:
        """Allocate what `table` lacks to hold `num_tokens` tokens; False, and nothing is taken, without room."""
        missing = blocks_for(num_tokens, self.block_size) - len(table)
        if missing > 0:
            if not self.can_allocate(missing):
                return False
            table += self.allocate(missing)
        return True

    def free(self, block_ids: Iterable[BlockId]) -> None:
        """One reference less on each block. Without any, it is cached if it can be found, and free otherwise.

        Free a sequence's blocks in reverse: a block is of no use without those before it, so the last is evicted first.
        Raises InternalError for a block without references.
        """
        for block_id in block_ids:
            count = self._ref_counts.get(block_id, 0)
            if count == 0:
                generation = self._generations.get(block_id, 0)
                raise InternalError(f"block {block_id} (generation {generation}) is freed but nobody holds it")
            self._ref_counts[block_id] = count - 1
            if count > 1:
                continue
            if block_id in self._hash_of:
                self._cached[block_id] = None
            else:
                self._free.append(block_id)

    def publish(self, block_id: BlockId, block_hash: BlockHash) -> bool:
        """Make a full, computed block findable by its hash. False when another block has it, or the cache is off.

        Raises InternalError for a block nobody references, or one that already stands for other tokens.
        """
        if not self.enable_prefix_cache:
            return False
        if self._ref_counts.get(block_id, 0) == 0:
            raise InternalError(f"block {block_id} is published but nobody holds it")
        if self._hash_of.get(block_id, block_hash) != block_hash:
            raise InternalError(f"block {block_id} is published under a second hash")
        holder = self._block_of.setdefault(block_hash, block_id)
        if holder != block_id:
            return False
        if self.listener is not None and block_id not in self._hash_of:
            self.listener.stored(block_hash)
        self._hash_of[block_id] = block_hash
        return True

    def unpublish(self, block_ids: Iterable[BlockId]) -> None:
        """Blocks whose content is in doubt are found no more. Their references stay; cached ones become free."""
        for block_id in block_ids:
            self._forget(block_id)
            if block_id in self._cached:
                del self._cached[block_id]
                self._free.append(block_id)

    def reset_prefix_cache(self) -> int:
        """Nothing is findable afterwards. Returns how many blocks were."""
        published = sorted(self._hash_of, reverse=True)
        self.unpublish(published)
        return len(published)

    def adopt(self, block_ids: Iterable[BlockId]) -> None:
        """Blocks enter the pool as free ones. Raises InternalError, and takes none, for one that is in it already."""
        fresh = self._enter(block_ids, 0)
        self._free += reversed(fresh)  # `allocate` takes from the end: ascending ids stay side by side

    def adopt_held(self, block_ids: Iterable[BlockId]) -> None:
        """Blocks enter the pool in use: with content, and one reference that the caller holds. Raises as `adopt`."""
        for block_id in self._enter(block_ids, 1):
            self._generations[block_id] += 1

    def surrender(self, block_ids: Iterable[BlockId]) -> None:
        """Blocks leave the pool, with the one reference that the caller holds; they are found no more.

        Raises InternalError, and lets none go, for a block that is referenced by nobody or by others too.
        """
        leaving = list(block_ids)
        for block_id in leaving:
            count = self._ref_counts.get(block_id)
            if count != 1:
                found = "is not in this pool" if count is None else f"has {count} references"
                raise InternalError(f"block {block_id} {found}; only one that its holder alone references can leave")
        if len(set(leaving)) != len(leaving):
            raise InternalError(f"blocks {leaving} leave, one of them twice")
        for block_id in leaving:
            self._forget(block_id)
            del self._ref_counts[block_id]

    def check_invariants(self, owners: Iterable[Iterable[BlockId]] | None = None) -> None:
        """Raise AssertionError, naming block and numbers, unless every block is in one place and counts agree.

        `owners` are the block tables of all who hold references: a block's count equals how often it stands in them.
        """
        places = Counter(self._free) + Counter(list(self._cached))
        for block_id, count in self._ref_counts.items():
            found = places.pop(block_id, 0) + (count > 0)
            assert count >= 0, f"block {block_id} has {count} references"
            assert found == 1, f"block {block_id} is in {found} places, with {count} references"
        assert not places, f"blocks {sorted(places)} are outside the pool of {self.num_blocks}"
        self._check_hashes()
        if owners is not None:
            self._check_owners(Counter(block_id for table in owners for block_id in table))

    def _enter(self, block_ids: Iterable[BlockId], count: int) -> list[BlockId]:
        """`block_ids` ascending, in the pool with `count` references each and in no place yet."""
        fresh = sorted(block_ids)
        twice = [block_id for block_id in fresh if block_id in self._ref_counts]
        if twice or len(set(fresh)) != len(fresh):
            raise InternalError(f"blocks {twice or fresh} enter a pool that has them already")
        for block_id in fresh:
            self._ref_counts[block_id] = count
            self._generations.setdefault(block_id, 0)
        return fresh

    def _evict_oldest(self) -> BlockId:
        block_id, _ = self._cached.popitem(last=False)
        self._forget(block_id)
        return block_id

    def _forget(self, block_id: BlockId) -> None:
        block_hash = self._hash_of.pop(block_id, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            if self.listener is not None:
                self.listener.removed(block_hash)

    def _check_hashes(self) -> None:
        inverse = {block_id: block_hash for block_hash, block_id in self._block_of.items()}
        differing = sorted(dict(inverse.items() ^ self._hash_of.items()))
        assert not differing, f"hash → block and block → hash differ for blocks {differing}"
        assert len(self._block_of) == len(inverse), f"{len(self._block_of)} hashes name {len(inverse)} blocks"
        lost = [block_id for block_id in self._cached if block_id not in self._hash_of]
        assert not lost, f"blocks {lost} are cached but have no hash"
        reused = [block_id for block_id in self._free if block_id in self._hash_of]
        assert not reused, f"blocks {reused} are free but can be found by hash"

    def _check_owners(self, held: Counter[BlockId]) -> None:
        for block_id in sorted(held.keys() | {block_id for block_id, count in self._ref_counts.items() if count}):
            known = self._ref_counts.get(block_id, 0)
            assert known == held[block_id], f"block {block_id} has {known} references but {held[block_id]} owners"
