from __future__ import annotations

from itertools import pairwise

import pytest

from penstock.protocol.messages import pack_ids
from penstock.router.prefix_ladder import (
    COARSE_STEP,
    FINE_TOKENS,
    MIDDLE_STEP,
    covered_tokens,
    extend_rung_hashes,
    num_full_rungs,
    rung_sizes,
)

KEY = b"k" * 32


@pytest.mark.parametrize("block_size", [1, 4, 16, 24, 64, 100, 512, 1000, 2048])
def test_rungs_are_whole_blocks_that_follow_each_other(block_size: int) -> None:
    stops = [covered_tokens(rung, block_size) for rung in range(400)]
    steps = [after - before for before, after in pairwise(stops)]
    assert stops[0] == 0
    assert all(step > 0 and step % block_size == 0 for step in steps)
    assert all(later >= earlier for earlier, later in pairwise(steps))
    assert rung_sizes(399, block_size)[:399] == steps


@pytest.mark.parametrize("block_size", [1, 16, 24, 100, 512, 2048])
def test_full_rungs_are_counted_as_they_are_covered(block_size: int) -> None:
    for num_tokens in (0, 1, block_size - 1, block_size, 1023, 1024, 1025, 8191, 8192, 8704, 99_999):
        rungs = num_full_rungs(num_tokens, block_size)
        assert covered_tokens(rungs, block_size) <= num_tokens < covered_tokens(rungs + 1, block_size)


def test_long_prompts_have_few_rungs() -> None:
    assert num_full_rungs(FINE_TOKENS, 16) == 64
    assert num_full_rungs(100_000, 16) == 64 + (8192 - 1024) // MIDDLE_STEP + (100_000 - 8192) // COARSE_STEP


def test_hashes_extend_in_steps() -> None:
    ids = list(range(20_000))
    whole: list[int] = []
    extend_rung_hashes(whole, KEY, pack_ids(ids), 16)
    assert len(set(whole)) == num_full_rungs(20_000, 16)
    grown: list[int] = []
    for length in (10, 500, 1030, 9000, 9001, 20_000):
        extend_rung_hashes(grown, KEY, pack_ids(ids[:length]), 16)
    assert grown == whole


def test_a_difference_changes_its_rung_and_all_after_it() -> None:
    ids = list(range(3000))
    first: list[int] = []
    second: list[int] = []
    extend_rung_hashes(first, KEY, pack_ids(ids), 16)
    extend_rung_hashes(second, KEY, pack_ids([*ids[:1100], 9, *ids[1101:]]), 16)
    same = [a == b for a, b in zip(first, second, strict=True)]
    assert same == [True] * 65 + [False] * (len(first) - 65)
