"""Bytes of preempted sequences in host memory: they come back as they went out, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import InternalError
from penstock.core.ids import AttemptKey, BlockId
from penstock.engine.kv_memory import KVMemory
from penstock.engine.parking import Parking, SeqName
from penstock.testing.clock import FakeClock
from penstock.testing.sim_parking import SteppingClock

NUM_BLOCKS, BLOCK_BYTES = 8, 2 * 24


def name(text: str, choice: int = 0) -> SeqName:
    return SeqName(AttemptKey(text, 1), choice)


def ids(*numbers: int) -> list[BlockId]:
    return [BlockId(number) for number in numbers]


@pytest.fixture
def memory() -> Iterator[KVMemory]:
    """Eight blocks of two layers, each filled with its own number."""
    memory = KVMemory(NUM_BLOCKS, 2, BLOCK_BYTES // 2)
    for block in range(NUM_BLOCKS):
        memory.block(block)[:] = bytes([block + 1]) * BLOCK_BYTES
    yield memory
    memory.close()


def fill(memory: KVMemory, value: int) -> None:
    memory.buffer[:] = bytes([value]) * memory.nbytes


def contents(memory: KVMemory, *blocks: int) -> list[int]:
    """The byte that each block is filled with."""
    for block in blocks:
        assert len(set(memory.block(block))) == 1, f"block {block} is torn"
    return [memory.block(block)[0] for block in blocks]


def test_parked_blocks_come_back_into_other_blocks_as_they_were(memory: KVMemory) -> None:
    parking = Parking(memory, 4 * BLOCK_BYTES, FakeClock())
    assert parking.park(name("a"), ids(5, 2, 7))
    assert parking.parked_bytes == 3 * BLOCK_BYTES
    fill(memory, 0)
    assert parking.unpark(name("a"), 0, ids(0, 1, 3)) == 3
    assert contents(memory, 0, 1, 3) == [6, 3, 8]
    assert contents(memory, 2, 4, 5, 6, 7) == [0] * 5
    assert parking.parked_bytes == 0


def test_unpark_from_an_ordinal_on_leaves_the_rest_alone(memory: KVMemory) -> None:
    parking = Parking(memory, 4 * BLOCK_BYTES, FakeClock())
    parking.park(name("a"), ids(0, 1, 2, 3))
    fill(memory, 99)
    assert parking.unpark(name("a"), 2, ids(6)) == 1
    assert contents(memory, *range(NUM_BLOCKS)) == [99] * 6 + [3] + [99]
    parking.check_invariants({})


def test_park_is_all_or_nothing_within_the_capacity(memory: KVMemory) -> None:
    parking = Parking(memory, 4 * BLOCK_BYTES + BLOCK_BYTES - 1, FakeClock())
    assert parking.park(name("a"), ids(0, 1, 2))
    assert not parking.park(name("b"), ids(3, 4))
    parking.check_invariants({name("a"): 3})
    assert parking.take_copied().nbytes == 3 * BLOCK_BYTES
    assert parking.park(name("b", 1), ids(3))
    parking.free(name("a"))
    assert parking.park(name("b"), ids(3, 4, 5))
    assert parking.parked_bytes == 4 * BLOCK_BYTES


@pytest.mark.parametrize("capacity_bytes", [0, BLOCK_BYTES - 1])
def test_parking_without_room_for_a_block_parks_nothing(memory: KVMemory, capacity_bytes: int) -> None:
    parking = Parking(memory, capacity_bytes, FakeClock())
    assert not parking.park(name("a"), ids(0))
    parking.check_invariants({})


def test_free_is_idempotent_and_frees_once(memory: KVMemory) -> None:
    parking = Parking(memory, 2 * BLOCK_BYTES, FakeClock())
    parking.park(name("a"), ids(0))
    parking.park(name("b"), ids(1))
    for _ in range(3):
        parking.free(name("a"))
    parking.free(name("never"))
    parking.check_invariants({name("b"): 1})
    assert not parking.park(name("c"), ids(2, 3))
    fill(memory, 0)
    assert parking.unpark(name("b"), 0, ids(4)) == 1
    assert contents(memory, 4) == [2]


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_corrupt_copy_counts_as_right_only_up_to_it(memory: KVMemory, spoiled: int) -> None:
    parking = Parking(memory, 4 * BLOCK_BYTES, FakeClock())
    parking.park(name("a"), ids(0, 1, 2))
    parking.views(name("a"))[spoiled][BLOCK_BYTES - 1] ^= 1
    assert parking.unpark(name("a"), 0, ids(4, 5, 6)) == spoiled
    assert parking.num_corrupt == 1
    parking.check_invariants({})


def test_unpark_ignores_a_corrupt_block_that_the_prefix_cache_has(memory: KVMemory) -> None:
    parking = Parking(memory, 4 * BLOCK_BYTES, FakeClock())
    parking.park(name("a"), ids(0, 1, 2))
    parking.views(name("a"))[0][0] ^= 1
    assert parking.unpark(name("a"), 1, ids(4, 5)) == 2
    assert parking.num_corrupt == 0


def test_parking_twice_and_unparking_what_is_not_there_are_our_own_bugs(memory: KVMemory) -> None:
    parking = Parking(memory, 4 * BLOCK_BYTES, FakeClock())
    parking.park(name("a"), ids(0, 1))
    with pytest.raises(InternalError, match="parked already"):
        parking.park(name("a"), ids(0))
    with pytest.raises(InternalError, match="no blocks parked"):
        parking.unpark(name("b"), 0, ids(0))
    with pytest.raises(InternalError, match=r"has 2 blocks parked, \[1, 3\) are wanted"):
        parking.unpark(name("a"), 1, ids(4, 5))
    parking.check_invariants({name("a"): 2})


def test_copies_are_counted_with_their_time_until_taken(memory: KVMemory) -> None:
    parking = Parking(memory, 4 * BLOCK_BYTES, SteppingClock(0.5))
    parking.park(name("a"), ids(0, 1, 2))
    parking.unpark(name("a"), 1, ids(4, 5))
    assert parking.take_copied() == (5 * BLOCK_BYTES, 1.0)
    assert parking.take_copied() == (0, 0.0)


@pytest.mark.parametrize("expected", [{}, {name("a"): 1}, {name("b"): 2}, {name("a"): 2, name("b"): 1}])
def test_check_invariants_notices_other_books(memory: KVMemory, expected: dict[SeqName, int]) -> None:
    parking = Parking(memory, 4 * BLOCK_BYTES, FakeClock())
    parking.park(name("a"), ids(0, 1))
    with pytest.raises(AssertionError, match="parked are"):
        parking.check_invariants(expected)


def test_check_invariants_notices_a_place_that_is_free_and_taken(memory: KVMemory) -> None:
    parking = Parking(memory, 4 * BLOCK_BYTES, FakeClock())
    parking.park(name("a"), ids(0, 1))
    parking._free.append(parking._parked[name("a")].places[0])
    with pytest.raises(AssertionError, match="places"):
        parking.check_invariants({name("a"): 2})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["park", "unpark", "free"]), st.integers(0, 3), st.integers(1, 4))))
def test_any_history_keeps_every_byte_and_every_place(steps: list[tuple[str, int, int]]) -> None:
    memory = KVMemory(NUM_BLOCKS, 2, BLOCK_BYTES // 2)
    parking = Parking(memory, 6 * BLOCK_BYTES, FakeClock())
    model: dict[SeqName, list[int]] = {}
    for count, (what, number, size) in enumerate(steps):
        who = name(str(number))
        if what == "park" and who not in model:
            values = [(count * 5 + i) % 251 for i in range(size)]
            for block, value in enumerate(values):
                memory.block(block)[:] = bytes([value]) * BLOCK_BYTES
            has_room = sum(map(len, model.values())) + size <= 6
            assert parking.park(who, ids(*range(size))) == has_room
            if has_room:
                model[who] = values
        elif what == "unpark" and who in model:
            fill(memory, 255)
            values = model.pop(who)
            assert parking.unpark(who, 0, ids(*range(4, 4 + len(values)))) == len(values)
            assert contents(memory, *range(4, 4 + len(values))) == values
        elif what == "free":
            parking.free(who)
            model.pop(who, None)
        parking.check_invariants({who: len(values) for who, values in model.items()})
    memory.close()
