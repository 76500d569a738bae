"""Handing blocks over within one memory: the block changes its owner, and not a byte of it moves.

    source        choose: which blocks go, which are copied     give: out of our pool, into the ledger, then the Push
    destination   the Push: `is_given` tells one from the other take: into our pool, and as many granted blocks back
    both          settle: what became ours and nobody adopted, and what we have above our share; on every tick, and
                  when a peer or a hand-off is lost

The ledger alone says whose a block is; a pool is one incarnation's memory of it and may die at any moment. A gift is
of one of two kinds. With tag 0 its content is of no use, and whoever finds it takes it as free: that is how granted
blocks come back to the source, with no message. With a grant's tag it carries a sequence, and the destination adopts
it on the Push of that grant; once the hand-off has ended without it, no Push can come, and `settle` takes it as free.
So nobody has to be told of a loss, and nothing is kept about peers. Blocks named for a worker that is not there wait
for its next incarnation, which begins with all that the ledger says is its own (`first_pool`).

Losses leave workers above or below their share; who is above gives free blocks to those below, until all are level.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import InternalError, ProtocolError
from ..core.ids import BlockId
from ..core.prefix_hash import BlockHash
from ..core.recent import RecentSet
from ..engine.block_pool import BlockPool
from ..engine.ledger import Ledger, tag_of

TRANSPORT = "owner"  # a link between two workers that keep their blocks in one memory
MAX_REMEMBERED = 1 << 16  # hashes of blocks given away: of a gigabyte of cache and more


@dataclass(frozen=True, slots=True)
class Settled:
    """What `settle` did: blocks found to be ours and taken as free, and blocks given to others that were short."""

    num_found: int = 0
    num_levelled: int = 0


@dataclass(frozen=True, slots=True)
class Candidates:
    """A computed sequence to be handed over: its block table, the hashes of its full blocks, and how many leading
    blocks came from our prefix cache.
    """

    block_table: Sequence[BlockId]
    hashes: Sequence[BlockHash]
    num_found: int


def first_pool(ledger: Ledger, owner: int, block_size: int) -> BlockPool:
    """The pool of a new incarnation of `owner`: everything that is its own, all free."""
    return BlockPool.of(ledger.blocks_of(owner), block_size)


def is_given(ledger: Ledger, block_id: int, me: int, generation: int) -> bool:
    """The block was given to `me` under this grant. Any thread; raises ProtocolError for one outside the memory."""
    return _entry(ledger, block_id) == (me, tag_of(generation))


class Ownership:
    """One worker's side of all exchanges, over its own `pool`; on the thread that owns the pool.

    `keep_prefix`: see `choose`. `number_of`: the number of a worker by its id; may raise ProtocolError. `live`: what
    `settle` leaves alone; the decode role sets it. `refused` counts pushes that named blocks which were not given to
    us, `num_given` and `num_taken` blocks.
    """

    def __init__(
        self,
        ledger: Ledger,
        pool: BlockPool,
        me: int,
        *,
        keep_prefix: bool = True,
        number_of: Callable[[str], int] | None = None,
    ) -> None:
        self._ledger, self._pool, self._me, self._keep_prefix = ledger, pool, me, keep_prefix
        self._given_before: RecentSet[BlockHash] = RecentSet(MAX_REMEMBERED)
        self._number_of = number_of or _nobody
        self.live: Callable[[], Iterable[int]] = tuple
        self.refused = self.num_given = self.num_taken = 0

    # ---- source ----

    def choose(self, candidates: Candidates) -> list[BlockId]:
        """Which of the blocks to give; the others are to be copied, and stay.

        The table may be a part of the sequence's, with the hashes and the count of that part. Ask right before `give`.
        A block that another sequence references stays. So does, with `keep_prefix`, a published one that has shown to
        be of use twice: it was found in the cache for this sequence, or is computed again after it was given away.
        """
        return [block_id for at, block_id in enumerate(candidates.block_table) if self._may_go(candidates, at)]

    def give(self, block_ids: Sequence[BlockId], to: int, generation: int) -> None:
        """The blocks leave our pool, with the caller's reference, and are `to`'s under this grant of its.

        Nothing of the sequence may be computed any more. Send the Push behind it. Raises InternalError, and gives
        nothing, for a block that is not ours alone.
        """
        self._pool.surrender(block_ids)
        self._ledger.give(block_ids, self._me, to, tag_of(generation))
        self.num_given += len(block_ids)

    def hand_over(self, candidates: Candidates, peer: str, generation: int) -> set[BlockId]:
        """Give worker `peer` what may go, under this grant of its; the blocks that are gone. The rest stays."""
        given = self.choose(candidates)
        self.give(given, self._number_of(peer), generation)
        return set(given)

    # ---- destination ----

    def take(self, block_ids: Sequence[int], granted: Sequence[BlockId], giver: int, generation: int) -> list[BlockId]:
        """Blocks that a Push of `giver` names become ours, with one reference each; as many granted ones go back.

        `granted` are the blocks that were to hold their content, one for each, referenced by the caller alone; they
        leave our pool. Raises ProtocolError, counts it, and changes nothing, unless all were given to us under
        `generation` and are new here.
        """
        if len(granted) != len(block_ids):
            raise InternalError(f"{len(block_ids)} blocks are taken in place of {len(granted)}")
        taken = self._checked(block_ids, giver, generation)
        self._pool.surrender(granted)
        self._pool.adopt_held(taken)
        self._ledger.give(granted, self._me, giver)
        self.num_taken += len(taken)
        return taken

    def take_over(self, table: list[BlockId], given: Mapping[int, BlockId], peer: str, generation: int) -> None:
        """What worker `peer` gave (ordinal → block) stands in `table` for the blocks granted. Raises as `take`."""
        granted = [table[ordinal] for ordinal in given]
        taken = self.take(list(given.values()), granted, self._number_of(peer), generation)
        for ordinal, block_id in zip(given, taken, strict=True):
            table[ordinal] = block_id

    # ---- both ----

    def settle(self, live: Iterable[int] | None = None) -> Settled:
        """Take as free what is ours and in no pool, and give what is above our share to those below theirs.

        `live`: generations of all our grants that have not ended; what was given under them is left for its Push.
        """
        found: list[BlockId] = []
        if self._ledger.count(self._me) != self._pool.num_blocks:  # a pool has nothing but its owner's blocks
            tags = {tag_of(generation) for generation in (self.live() if live is None else live)}
            found = [block_id for block_id in self._ledger.blocks_of(self._me) if self._is_lost(block_id, tags)]
            self._pool.adopt(found)
        return Settled(len(found), self._level())

    @property
    def num_below_share(self) -> int:
        """How many blocks of our share others have, or hold on their way."""
        return max(0, self._ledger.share(self._me) - self._pool.num_blocks)

    # ---- inside ----

    def _may_go(self, candidates: Candidates, at: int) -> bool:
        block_id = candidates.block_table[at]
        if self._pool.ref_count(block_id) != 1:
            return False
        if not self._keep_prefix or not self._pool.is_published(block_id) or at >= len(candidates.hashes):
            return True
        return at >= candidates.num_found and self._given_before.add(candidates.hashes[at])

    def _checked(self, block_ids: Sequence[int], giver: int, generation: int) -> list[BlockId]:
        try:
            if giver == self._me or not self._ledger.is_owner(giver):
                raise ProtocolError(f"a gift from worker {giver} to worker {self._me} of {len(self._ledger.shares)}")
            if len(set(block_ids)) != len(block_ids):
                raise ProtocolError(f"blocks {list(block_ids)} are given, one of them twice")
            return [self._given(block_id, generation) for block_id in block_ids]
        except ProtocolError:
            self.refused += 1
            raise

    def _given(self, block_id: int, generation: int) -> BlockId:
        entry, wanted = _entry(self._ledger, block_id), (self._me, tag_of(generation))
        if entry != wanted or BlockId(block_id) in self._pool:
            state = "is here already" if entry == wanted else f"is {entry}, wanted {wanted} (owner, tag)"
            raise ProtocolError(f"a push names block {block_id} as given, but it {state}")
        return BlockId(block_id)

    def _is_lost(self, block_id: BlockId, live_tags: Container[int]) -> bool:
        return block_id not in self._pool and self._ledger.entry(block_id).tag not in live_tags

    def _level(self) -> int:
        """Number of blocks given to owners below their share, out of what we have above ours and is free."""
        surplus = min(self._pool.num_blocks - self._ledger.share(self._me), self._pool.num_free_blocks)
        if surplus <= 0:
            return 0
        left = surplus
        for owner, count in enumerate(self._ledger.counts(), 1):
            num_blocks = min(left, self._ledger.share(owner) - count)
            if num_blocks > 0:
                leaving = self._pool.allocate(num_blocks)
                self._pool.surrender(leaving)
                self._ledger.give(leaving, self._me, owner)
                left -= num_blocks
        return surplus - left


def _nobody(worker_id: str) -> int:
    raise ProtocolError(f"worker {worker_id} has no number here")


def check_conservation(ledger: Ledger, pools: Mapping[int, BlockPool], *, at_rest: bool = False) -> None:
    """Raise AssertionError unless every block has one owner and is in no pool but that owner's.

    `pools`: of the owners that live. `at_rest`: nothing is on its way, so a living owner's pool has all its blocks.
    """
    counts = ledger.counts()
    assert sum(counts) == ledger.num_blocks, f"{sum(counts)} of {ledger.num_blocks} blocks have an owner: {counts}"
    for owner, pool in pools.items():
        own, known = set(ledger.blocks_of(owner)), set(pool.block_ids())
        foreign = {block_id: ledger.entry(block_id).owner for block_id in sorted(known - own)}
        assert not foreign, f"the pool of worker {owner} has blocks of others: {foreign} (block: owner)"
        assert not at_rest or own == known, f"worker {owner} owns blocks {sorted(own - known)} and does not know it"


def _entry(ledger: Ledger, block_id: int) -> tuple[int, int]:
    try:
        return ledger.entry(block_id)
    except IndexError as err:
        raise ProtocolError(f"a push names {err}") from err
