"""The exchange of owners: by example, over random histories with deaths, and with real tokens behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import pytest

from penstock.core.errors import InternalError, ProtocolError
from penstock.core.ids import AttemptKey, BlockId
from penstock.engine.block_pool import BlockPool
from penstock.engine.interface import ScheduledSeq
from penstock.engine.kv_memory import KVMemory
from penstock.engine.ledger import Ledger, ledger_bytes, tag_of
from penstock.engine.sequence import Sequence, blocks_for
from penstock.kvtransfer.bulk import Span
from penstock.kvtransfer.ownership import Candidates, Ownership, Settled, check_conservation, first_pool, is_given
from penstock.kvtransfer.transports.owner import OwnerBulk
from penstock.protocol.sampling import SamplingParams
from penstock.testing.fake_engine import FakeEngine, expected_tokens

from .ownership_world import World

SHARES = (8, 8)
P, D = 1, 2


class Pair:
    """Source 1 and destination 2, each with its own mapping of the words."""

    def __init__(self, *, keep_prefix: bool = True, words: bytearray | None = None) -> None:
        self.words = words or bytearray(ledger_bytes(SHARES))
        self.ledger = Ledger(memoryview(self.words), SHARES)
        self.pools = {owner: first_pool(self.ledger, owner, 4) for owner in (P, D)}
        self.p, self.d = (
            Ownership(Ledger(memoryview(self.words), SHARES), self.pools[owner], owner, keep_prefix=keep_prefix)
            for owner in (P, D)
        )

    def check(self, *, at_rest: bool = False) -> None:
        check_conservation(self.ledger, self.pools, at_rest=at_rest)


def name(number: int) -> bytes:
    return bytes([number]) * 32


def test_hand_off_swaps_owners_and_leaves_both_with_as_many_blocks() -> None:
    pair = Pair()
    table, granted = pair.pools[P].allocate(3), pair.pools[D].allocate(3)
    pair.p.give(table, D, generation=5)
    pair.check()
    assert (pair.pools[P].num_blocks, pair.p.num_below_share) == (5, 3)
    assert all(is_given(pair.ledger, block_id, D, 5) for block_id in table)
    assert not any(is_given(pair.ledger, block_id, D, 6) for block_id in table)
    assert pair.d.take(table, granted, P, 5) == table
    assert pair.pools[D].block_ids() == [0, 1, 2, 11, 12, 13, 14, 15]
    pair.pools[D].check_invariants([table])
    assert pair.p.settle([]) == Settled(num_found=3), "paid back with no message"
    assert pair.pools[P].block_ids() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert (pair.pools[P].num_free_blocks, pair.p.num_below_share) == (8, 0)
    pair.check(at_rest=True)


def test_gift_waits_for_its_push_while_its_grant_lives_and_is_free_afterwards() -> None:
    pair = Pair()
    table, granted = pair.pools[P].allocate(2), pair.pools[D].allocate(2)
    pair.p.give(table, D, 5)
    assert pair.d.settle([4, 5]) == Settled()
    assert pair.pools[D].num_blocks == 8
    pair.pools[D].free(granted)
    assert pair.d.settle([4]) == Settled(num_found=2, num_levelled=2), "found, and as many go to who is short"
    assert pair.p.settle([]) == Settled(num_found=2)
    assert [pool.num_blocks for pool in pair.pools.values()] == [8, 8]
    pair.check(at_rest=True)


def test_gift_that_comes_after_its_grant_has_ended_is_found_by_the_next_settle() -> None:
    pair = Pair()
    table = pair.pools[P].allocate(1)
    assert pair.d.settle([]) == Settled()
    pair.p.give(table, D, 5)
    assert pair.d.settle([]).num_found == 1


def test_next_incarnation_begins_with_all_that_is_its_own() -> None:
    pair = Pair()
    pair.p.give(pair.pools[P].allocate(3), D, 5)
    reborn = Pair(words=pair.words)
    assert reborn.pools[D].num_free_blocks == 11
    assert reborn.pools[P].num_free_blocks == 5
    assert reborn.d.settle([]) == Settled(num_levelled=3)
    reborn.p.settle([])
    reborn.check(at_rest=True)


def test_blocks_above_the_share_stay_while_they_are_in_use() -> None:
    pair = Pair()
    table, granted = pair.pools[P].allocate(4), pair.pools[D].allocate(4)
    pair.p.give(table, D, 5)
    pair.pools[D].free(granted)
    busy = pair.pools[D].allocate(8)
    assert pair.d.settle([5]) == Settled()
    assert pair.d.settle([]) == Settled(4, 4)
    assert pair.d.settle([]) == Settled()
    pair.pools[D].check_invariants([busy])


@pytest.mark.parametrize(
    ("block_ids", "giver", "generation", "why"),
    [
        ([0, 1], P, 6, "block 0 as given, but it is Entry"),
        ([0, 3], P, 5, "block 3 as given, but it is Entry"),
        ([0, 9], P, 5, "block 9 as given, but it is Entry"),
        ([0, 16], P, 5, "block 16 of 16"),
        ([0, -1], P, 5, "block -1 of 16"),
        ([0, 0], P, 5, "one of them twice"),
        ([0, 1], D, 5, "a gift from worker 2 to worker 2"),
        ([0, 1], 0, 5, "a gift from worker 0"),
        ([0, 1], 3, 5, "a gift from worker 3 to worker 2 of 2"),
    ],
)
def test_push_that_names_what_was_not_given_is_refused_and_changes_nothing(
    block_ids: list[int], giver: int, generation: int, why: str
) -> None:
    pair = Pair()
    granted = pair.pools[D].allocate(2)
    pair.p.give(pair.pools[P].allocate(2), D, 5)
    before = bytes(pair.words)
    with pytest.raises(ProtocolError, match=why):
        pair.d.take(block_ids, granted, giver, generation)
    assert (pair.d.refused, bytes(pair.words), pair.pools[D].num_blocks) == (1, before, 8)
    pair.pools[D].check_invariants([granted])


def test_push_that_comes_twice_is_refused() -> None:
    pair = Pair()
    table, granted = pair.pools[P].allocate(1), pair.pools[D].allocate(2)
    pair.p.give(table, D, 5)
    pair.d.take(table, granted[:1], P, 5)
    with pytest.raises(ProtocolError, match="block 0 as given, but it is here already"):
        pair.d.take(table, granted[1:], P, 5)
    assert pair.d.refused == 1


def test_taking_in_place_of_another_number_of_blocks_is_our_own_fault() -> None:
    pair = Pair()
    table = pair.pools[P].allocate(2)
    pair.p.give(table, D, 5)
    with pytest.raises(InternalError, match="2 blocks are taken in place of 1"):
        pair.d.take(table, pair.pools[D].allocate(1), P, 5)
    pair.check()


def test_giving_a_shared_block_raises_and_gives_nothing() -> None:
    pair = Pair()
    table = pair.pools[P].allocate(2)
    pair.pools[P].publish(table[1], name(1))
    pair.pools[P].acquire(table[1:])
    with pytest.raises(InternalError, match="block 1 has 2 references"):
        pair.p.give(table, D, 5)
    assert pair.ledger.counts() == list(SHARES)
    pair.pools[P].check_invariants([table, table[1:]])


# ---- which blocks go ----


def published(pool: BlockPool, numbers: Iterable[int]) -> tuple[list[BlockId], list[bytes]]:
    hashes = [name(number) for number in numbers]
    table = pool.allocate(len(hashes))
    for block_id, block_hash in zip(table, hashes, strict=True):
        pool.publish(block_id, block_hash)
    return table, hashes


def test_fresh_blocks_go_and_what_was_found_in_the_cache_stays() -> None:
    pair = Pair()
    table, hashes = published(pair.pools[P], range(3))
    partial = pair.pools[P].allocate(1)
    assert pair.p.choose(Candidates([*table, *partial], hashes, num_found=1)) == [*table[1:], *partial]


def test_block_that_another_sequence_reads_stays() -> None:
    for keep_prefix in (True, False):
        pair = Pair(keep_prefix=keep_prefix)
        table, hashes = published(pair.pools[P], range(2))
        pair.pools[P].acquire(table[:1])
        assert pair.p.choose(Candidates(table, hashes, num_found=0)) == table[1:]


def test_prefix_that_is_computed_again_after_it_was_given_stays_from_then_on() -> None:
    pair = Pair()
    table, hashes = published(pair.pools[P], range(2))
    assert pair.p.choose(Candidates(table, hashes, 0)) == table
    pair.p.give(table, D, 5)
    again, hashes = published(pair.pools[P], range(3))
    assert pair.p.choose(Candidates(again, hashes, 0)) == again[2:]


def test_copy_of_a_block_that_stays_findable_goes() -> None:
    pair = Pair()
    first, hashes = published(pair.pools[P], [1])
    assert pair.p.choose(Candidates(first, hashes, 1)) == []
    second = pair.pools[P].allocate(1)
    assert not pair.pools[P].publish(second[0], hashes[0])
    assert pair.p.choose(Candidates(second, hashes, 0)) == second


def test_without_keeping_prefixes_everything_unshared_goes() -> None:
    pair = Pair(keep_prefix=False)
    table, hashes = published(pair.pools[P], range(2))
    for _ in range(2):
        assert pair.p.choose(Candidates(table, hashes, num_found=2)) == table


# ---- random histories ----


def run_worlds(num_seeds: int, make: type[Ownership] = Ownership) -> Counter[str]:
    """What happened in all of them together."""
    happened: Counter[str] = Counter()
    for seed in range(num_seeds):
        world = World(seed, make)
        try:
            world.run(150)
        except BaseException as error:
            error.add_note(f"World({seed}).run(150)")
            raise
        happened += world.happened
    return happened


def test_random_histories_with_deaths_between_any_two_stores_lose_nothing() -> None:
    happened = run_worlds(200)
    kinds = ("taken", "copied", "shared", "late", "lost", "found", "levelled", "restarted", "given to the dead")
    assert all(happened[kind] > 20 for kind in kinds), happened
    assert happened["killed between two stores"] > 100, happened


class KeepsWhatItGave(Ownership):
    def give(self, block_ids: SequenceOf[BlockId], to: int, generation: int) -> None:
        self._ledger.give(block_ids, self._me, to, tag_of(generation))


class TakesGiftsTooEarly(Ownership):
    def settle(self, live: Iterable[int] | None = None) -> Settled:
        return super().settle([])


class ForgetsToPay(Ownership):
    def take(
        self, block_ids: SequenceOf[int], granted: SequenceOf[BlockId], giver: int, generation: int
    ) -> list[BlockId]:
        taken = self._checked(block_ids, giver, generation)
        self._pool.surrender(granted)
        self._pool.adopt_held(taken)
        return taken

    def settle(self, live: Iterable[int] | None = None) -> Settled:
        """Looks for gifts with content only."""
        tags = {tag_of(generation) for generation in live or ()} | {0}
        self._pool.adopt([b for b in self._ledger.blocks_of(self._me) if self._is_lost(b, tags)])
        return Settled()


class NeverLooks(Ownership):
    def settle(self, live: Iterable[int] | None = None) -> Settled:
        return Settled()


@pytest.mark.parametrize("planted", [KeepsWhatItGave, TakesGiftsTooEarly, ForgetsToPay, NeverLooks])
def test_planted_mistake_is_found(planted: type[Ownership]) -> None:
    with pytest.raises((AssertionError, InternalError, ProtocolError)):
        run_worlds(30, planted)


def test_conservation_names_a_foreign_block_and_a_lost_one() -> None:
    pair = Pair()
    pair.ledger.give([BlockId(3)], P, D)
    with pytest.raises(AssertionError, match=r"the pool of worker 1 has blocks of others: {3: 2}"):
        pair.check()
    pair.pools[P].surrender(pair.pools[P].allocate(4)[3:])
    pair.check()
    with pytest.raises(AssertionError, match=r"worker 2 owns blocks \[3\] and does not know it"):
        pair.check(at_rest=True)


# ---- with an engine ----

PARAMS = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)


class Worker:
    """A FakeEngine, a pool and an ownership over one memory; runs one sequence at a time."""

    def __init__(self, memory: KVMemory, ledger: Ledger, number: int) -> None:
        self.number, self.memory, self.ledger = number, memory, ledger
        self.engine = FakeEngine(num_blocks=ledger.share(number), block_size=4, memory=memory)
        self.pool = first_pool(ledger, number, 4)
        self.ownership = Ownership(ledger, self.pool, number)

    def prefill(self, prompt: list[int]) -> tuple[Sequence, int]:
        """The computed sequence, and its first token."""
        seq = Sequence(AttemptKey("r", 0), 0, prompt, PARAMS, b"", 0.0, 1.0)
        seq.block_table = self.pool.allocate(blocks_for(len(prompt), 4))
        ((token,),) = self.engine.execute([ScheduledSeq(seq, len(prompt))])
        for block_id, block_hash in zip(seq.block_table, seq.hashes(4), strict=False):
            self.pool.publish(block_id, block_hash)
        return seq, token.token_id

    def decode(self, prompt: list[int], table: list[BlockId], first: int) -> list[int]:
        seq = Sequence(AttemptKey("r", 0), 0, prompt, PARAMS, b"", 0.0, 1.0, [first], list(table))
        seq.num_computed_tokens = len(prompt)
        while len(seq.output_ids) < PARAMS.max_tokens:
            seq.block_table += self.pool.allocate(blocks_for(seq.num_tokens, 4) - len(seq.block_table))
            ((token,),) = self.engine.execute([ScheduledSeq(seq, 1)])
            seq.num_computed_tokens += 1
            seq.output_ids.append(token.token_id)
        self.pool.free(reversed(seq.block_table))
        return seq.output_ids


def spans(memory: KVMemory, table: Iterable[int]) -> list[Span]:
    return [Span(block_id * memory.block_bytes, memory.block_bytes) for block_id in table]


def hand_over(source: Worker, destination: Worker, seq: Sequence, generation: int) -> tuple[list[BlockId], int]:
    """As roles and link do it; the destination's table, and how many bytes were copied."""
    granted = destination.pool.allocate(len(seq.block_table))
    given = source.ownership.choose(Candidates(seq.block_table, seq.hashes(4), 0))
    source.ownership.give(given, destination.number, generation)
    bulk = OwnerBulk(destination.memory, destination.ledger, destination.number, source.number)
    stays = [is_given(destination.ledger, b, destination.number, generation) for b in seq.block_table]
    table = [b if stay else g for b, g, stay in zip(seq.block_table, granted, stays, strict=True)]
    bulk.receive(spans(source.memory, seq.block_table), spans(destination.memory, table), lambda: True)
    paid = [g for g, stay in zip(granted, stays, strict=True) if stay]
    destination.ownership.take(given, paid, source.number, generation)
    source.pool.free([b for b in seq.block_table if b not in given])
    source.ownership.settle([])
    return table, bulk.copied_bytes


def test_two_engines_on_one_memory_hand_over_without_moving_a_byte_and_decode_the_same_tokens() -> None:
    shares = (12, 12)
    memory = KVMemory(sum(shares), 2, 4 * 8)
    ledger = Ledger(memoryview(bytearray(ledger_bytes(shares))), shares)
    source, destination = (Worker(memory, ledger, number) for number in (P, D))
    for generation in range(1, 30):
        # The generation in the prompt: no two have a prefix in common, so everything goes.
        prompt = [generation, *range(100, 118)]
        seq, first = source.prefill(prompt)
        before = bytes(memory.region)
        table, copied = hand_over(source, destination, seq, generation)
        assert (table, copied) == (seq.block_table, 0)
        assert bytes(memory.region) == before, "not a byte has moved"
        assert destination.decode(prompt, table, first) == expected_tokens(prompt, PARAMS)[0]
        check_conservation(ledger, {P: source.pool, D: destination.pool}, at_rest=True)
        assert ledger.counts() == list(shares)
        assert source.pool.num_free_blocks == destination.pool.num_free_blocks == 12
    # The blocks of the two have mixed.
    assert ledger.blocks_of(P) != list(range(12))
    memory.close()


def test_prefix_that_comes_back_is_copied_within_the_memory_and_decodes_the_same_tokens() -> None:
    shares = (12, 12)
    memory = KVMemory(sum(shares), 2, 4 * 8)
    ledger = Ledger(memoryview(bytearray(ledger_bytes(shares))), shares)
    source, destination = (Worker(memory, ledger, number) for number in (P, D))
    prompt = list(range(50, 68))
    copied = []
    for generation in (1, 2):
        seq, first = source.prefill(prompt)
        table, num_bytes = hand_over(source, destination, seq, generation)
        copied.append(num_bytes)
        assert destination.decode(prompt, table, first) == expected_tokens(prompt, PARAMS)[0]
        check_conservation(ledger, {P: source.pool, D: destination.pool}, at_rest=True)
    assert copied == [0, 4 * memory.block_bytes], "the second time its four full blocks stay at the source"
    assert source.pool.match_prefix(seq.hashes(4)) == seq.block_table[:4]
    memory.close()
