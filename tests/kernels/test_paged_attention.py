"""The padded implementation against the obvious one, on a pool whose unused slots hold NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import InternalError
from penstock.kernels.kv_write.op import clear_blocks, kv_rows, store_kv
from penstock.kernels.paged_attention import reference
from penstock.kernels.paged_attention.op import paged_attention
from penstock.kernels.paged_attention.plan import SHORT_QUERY, TILE, AttentionPlan, PoolShape, build_plan
from penstock.kernels.paged_attention.tree import CAUSAL

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
NUM_LAYERS = 2
SCALE = 0.3


@dataclass
class Case:
    """A ragged batch with its pool filled; call `check` to compare."""

    q: torch.Tensor
    pool: torch.Tensor
    plan: AttentionPlan
    window: int | None
    tree: np.ndarray | None = None

    def check(self) -> None:
        window = self.window
        actual = paged_attention(self.q, self.pool, 1, self.plan, scale=SCALE, window=window)
        tree = None if self.tree is None else torch.from_numpy(self.tree)
        expected = reference.paged_attention(self.q, self.pool, 1, self.plan, SCALE, window, tree)
        assert actual.shape == self.q.shape
        tolerance = TOLERANCE[self.q.dtype]
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def make_case(
    lengths: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    group: int = 3,
    num_kv_heads: int = 2,
    block_size: int = 4,
    head_dim: int = 16,
    window: int | None = None,
    seed: int = 0,
    branches: bool = False,
) -> Case:
    """`lengths`: for each sequence (tokens already in the pool, new tokens). Blocks are dealt out in random order.

    The pool starts as NaN; tokens are written as an engine would, earlier ones in one step and new ones in the next.
    """
    order, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    context_lens = np.array([earlier + new for earlier, new in lengths])
    needed = [-(-int(length) // block_size) for length in context_lens]
    block_ids = list(range(sum(needed) + 3))
    order.shuffle(block_ids)
    tables = [[block_ids.pop() for _ in range(count)] for count in needed]
    pool = torch.full((sum(needed) + 3, NUM_LAYERS, 2, block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype)
    for table, length in zip(tables, context_lens, strict=True):
        if length % block_size:
            clear_blocks(pool, torch.tensor(table[-1:]))
        slots = torch.tensor([table[i // block_size] * block_size + i % block_size for i in range(length)])
        for layer in range(NUM_LAYERS):
            kv = torch.randn(int(length), 2, num_kv_heads * head_dim, generator=generator).to(dtype)
            store_kv(kv, pool, layer, kv_rows(slots, pool))
    width = max(needed)
    block_table = np.array([table + table[:1] * (width - len(table)) for table in tables])
    cu_seqlens_q = np.cumsum([0, *(new for _, new in lengths)])
    shape = PoolShape(NUM_LAYERS, block_size, group, dtype)
    tree = random_tree([new for _, new in lengths], order) if branches else None
    plan = build_plan(cu_seqlens_q, context_lens, block_table, shape, window, tree)
    q = torch.randn(plan.num_tokens, num_kv_heads * group + 5, head_dim, generator=generator).to(dtype)
    return Case(q[:, : num_kv_heads * group], pool, plan, window, tree)


def random_tree(query_lens: list[int], order: random.Random) -> np.ndarray:
    """Each new token but the first follows an earlier one; some sequences are chains, and long ones always."""
    rows: list[int] = []
    for length in query_lens:
        if length > SHORT_QUERY or order.random() < 0.3:
            rows += [CAUSAL] * length
            continue
        bits = [1]
        for place in range(1, length):
            bits.append(bits[order.randrange(place)] | 1 << place)
        rows += bits
    return np.array(rows, dtype=np.int64)


BATCHES = {
    "one token": [(0, 1)],
    "one decode": [(36, 1)],
    "decodes of like length": [(30, 1), (33, 1), (29, 1)],
    "decodes of all lengths": [(0, 1), (3, 1), (4, 1), (15, 1), (16, 1), (70, 1), (300, 1), (2, 1)],
    "one prompt": [(0, 45)],
    "one chunk": [(13, 50)],
    "long prompt": [(0, 2 * TILE + 5)],
    "long chunk": [(61, TILE + 1)],
    "short chunks": [(0, 2), (5, 3), (40, 4), (7, SHORT_QUERY), (0, 5)],
    "everything": [(8, 1), (0, 20), (31, 3), (12, 1), (90, 140), (4, 4), (64, 1), (0, 1)],
}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_batch_equals_reference(lengths: list[tuple[int, int]], dtype: torch.dtype) -> None:
    make_case(lengths, dtype=dtype).check()


@pytest.mark.parametrize("window", [1, 5, 16, 33, 1000])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_window_equals_reference(lengths: list[tuple[int, int]], window: int) -> None:
    make_case(lengths, window=window).check()


@pytest.mark.parametrize("group", [1, 3, 4, 9])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_head_and_block_shapes_equal_reference(group: int, num_kv_heads: int, block_size: int) -> None:
    lengths = BATCHES["everything"]
    make_case(lengths, group=group, num_kv_heads=num_kv_heads, block_size=block_size).check()
    make_case(lengths, group=group, num_kv_heads=num_kv_heads, block_size=block_size, dtype=torch.bfloat16).check()


@pytest.mark.parametrize("window", [None, 1, 5, 16, 33])
@pytest.mark.parametrize("seed", range(4))
def test_trees_equal_reference(window: int | None, seed: int) -> None:
    lengths = [(8, 1), (0, 20), (31, 3), (12, 9), (90, 140), (4, 4), (64, 16), (0, 7), (33, 12), (40, 4), (41, 4)]
    make_case(lengths, window=window, seed=seed, branches=True).check()
    make_case(lengths[3:4], window=window, seed=seed, dtype=torch.bfloat16, branches=True).check()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 150), st.sampled_from([1, 1, 1, 2, 3, 7, 16, 17, 40])), min_size=1, max_size=8
    ),
    block_size=st.sampled_from([2, 4, 16]),
    window=st.none() | st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_any_ragged_batch_equals_reference(
    lengths: list[tuple[int, int]], block_size: int, window: int | None, seed: int
) -> None:
    make_case(lengths, block_size=block_size, window=window, seed=seed).check()


def test_plan_for_a_window_also_serves_layers_without_one() -> None:
    case = make_case(BATCHES["everything"], window=9)
    case.window = None
    case.check()


def test_decode_batch_is_one_bucket_without_copies_of_q() -> None:
    plan = make_case([(30, 1), (31, 1), (28, 1), (24, 1)]).plan
    assert [bucket.rows for bucket in plan.short] == [slice(0, 4)]
    assert plan.short[0].kept is None


def test_buckets_bound_the_padding() -> None:
    plan = make_case([(length, 1) for length in (0, 3, 10, 50, 200, 250)]).plan
    longest = {bucket.key_len for bucket in plan.short}
    padded = sum(bucket.batch * bucket.key_len for bucket in plan.short)
    assert longest == {4, 12, 52, 252}
    assert padded == 2 * 4 + 12 + 52 + 2 * 252


def test_tiles_stop_at_the_diagonal() -> None:
    (query,) = make_case([(10, 2 * TILE + 7)]).plan.long
    assert [tile.key_stop for tile in query.tiles] == [10 + TILE, 10 + 2 * TILE, 10 + 2 * TILE + 7]


def test_window_tiles_skip_what_no_query_sees() -> None:
    (query,) = make_case([(10, 2 * TILE)], window=20).plan.long
    assert [tile.key_start for tile in query.window_tiles] == [0, 10 + TILE - 19]


def test_inputs_that_do_not_fit_are_refused() -> None:
    case = make_case([(5, 1), (9, 2)])
    q, pool, plan = case.q, case.pool, case.plan
    with pytest.raises(InternalError, match="2 rows, the plan 3 tokens"):
        paged_attention(q[:2], pool, 0, plan, scale=SCALE)
    with pytest.raises(InternalError, match="layer 2 of a pool with 2"):
        paged_attention(q, pool, 2, plan, scale=SCALE)
    with pytest.raises(InternalError, match="bfloat16"):
        paged_attention(q.bfloat16(), pool, 0, plan, scale=SCALE)
    with pytest.raises(InternalError, match=r"q is \[3, 5, 16\]"):
        paged_attention(q[:, :5], pool, 0, plan, scale=SCALE)
    with pytest.raises(InternalError, match="window 7, the plan was made for None"):
        paged_attention(q, pool, 0, plan, scale=SCALE, window=7)
