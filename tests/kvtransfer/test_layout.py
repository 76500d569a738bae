"""Random caches are cut into blocks, moved by a plan with byte copies alone, and read back at the other end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import LayoutMismatch
from penstock.engine.kv_memory import KVMemory
from penstock.kvtransfer.layout import BadLayout, CacheLayout, Copy, Order, compatible, plan

Bytes = npt.NDArray[np.uint8]
Shards = dict[tuple[int, int], Bytes]  # (shard, ordinal) → the block's bytes

SMALL = CacheLayout(num_layers=2, num_kv_heads=4, head_dim=3, itemsize=2, block_size=4)


def num_blocks(layout: CacheLayout, num_tokens: int) -> int:
    return -(-num_tokens // layout.block_size)


def view(layout: CacheLayout, block: Bytes) -> Bytes:
    """The block as [layer, K or V, token, head, byte], whatever its order."""
    heads = max(1, layout.num_kv_heads // layout.tp)
    size = layout.head_dim * layout.itemsize
    if layout.order == "token-major":
        return block.reshape(layout.num_layers, 2, layout.block_size, heads, size)
    return block.reshape(layout.num_layers, 2, heads, layout.block_size, size).transpose(0, 1, 3, 2, 4)


def heads_of(layout: CacheLayout, shard: int) -> list[int]:
    """Counted out one by one: shard 0 takes the first heads, and so on; replicas sit side by side."""
    if layout.tp > layout.num_kv_heads:
        owners = [head for head in range(layout.num_kv_heads) for _ in range(layout.tp // layout.num_kv_heads)]
        return [owners[shard]]
    return [head for head in range(layout.num_kv_heads) if head * layout.tp // layout.num_kv_heads == shard]


def scatter(layout: CacheLayout, cache: Bytes) -> Shards:
    """cache [layer, K or V, token, head, byte] → blocks; slots past the last token hold noise."""
    rng = np.random.default_rng(7)
    shards: Shards = {}
    for shard in range(layout.tp):
        for ordinal in range(num_blocks(layout, cache.shape[2])):
            block = rng.integers(0, 256, layout.block_bytes, dtype=np.uint8)
            part = cache[:, :, ordinal * layout.block_size :][:, :, : layout.block_size, heads_of(layout, shard)]
            view(layout, block)[:, :, : part.shape[2]] = part
            shards[shard, ordinal] = block
    return shards


def faults(
    copies: list[Copy], source: CacheLayout, target: CacheLayout, cache: Bytes, tokens: range, layers: range
) -> list[str]:
    """What is wrong with a plan, found by doing it. Each target byte counts how often it was written."""
    held = scatter(source, cache)
    written = scatter(target, np.zeros_like(cache))
    before = {key: block.copy() for key, block in written.items()}
    counts = {key: np.zeros(len(block), dtype=np.uint8) for key, block in written.items()}
    for copy in copies:
        origin = held[copy.source_shard, copy.source_ordinal][copy.source_offset :][: copy.nbytes]
        place = slice(copy.target_offset, copy.target_offset + copy.nbytes)
        if not 0 < copy.nbytes == len(origin) == len(written[copy.target_shard, copy.target_ordinal][place]):
            return [f"{copy} leaves its block"]
        written[copy.target_shard, copy.target_ordinal][place] = origin
        counts[copy.target_shard, copy.target_ordinal][place] += 1
    wanted_cache = np.zeros(cache.shape, dtype=np.uint8)
    wanted_cache[layers.start : layers.stop, :, tokens.start : tokens.stop] = 1
    found: list[str] = []
    for (shard, ordinal), block in written.items():
        heads = heads_of(target, shard)
        first = ordinal * target.block_size
        expected = view(target, before[shard, ordinal]).copy()
        count = np.zeros_like(expected)
        is_wanted = wanted_cache[:, :, first : first + target.block_size, heads]
        count[:, :, : is_wanted.shape[2]] = is_wanted
        right = cache[:, :, first : first + target.block_size, heads]
        expected[:, :, : is_wanted.shape[2]][is_wanted == 1] = right[is_wanted == 1]
        if not np.array_equal(view(target, counts[shard, ordinal]), count):
            found.append(f"shard {shard} block {ordinal}: a byte was not written exactly once, or should not have been")
        if not np.array_equal(view(target, block), expected):
            found.append(f"shard {shard} block {ordinal}: wrong bytes")
    return found


def merged_naively(copies: list[Copy], unit: int) -> set[Copy]:
    """The same bytes in units of one head of one token, joined wherever two touch on both sides, in any order."""
    units = [
        copy._replace(source_offset=copy.source_offset + at, target_offset=copy.target_offset + at, nbytes=unit)
        for copy in copies
        for at in range(0, copy.nbytes, unit)
    ]
    runs = {piece[:6]: piece for piece in units}  # by where they begin
    assert len(runs) == len(units)
    for begin in sorted(runs, reverse=True):
        run = runs[begin]
        after = run._replace(
            source_offset=run.source_offset + run.nbytes, target_offset=run.target_offset + run.nbytes
        )[:6]
        if after in runs:
            runs[begin] = run._replace(nbytes=run.nbytes + runs.pop(after).nbytes)
    return set(runs.values())


def random_cache(layout: CacheLayout, num_tokens: int) -> Bytes:
    shape = (layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim * layout.itemsize)
    return np.random.default_rng(num_tokens).integers(0, 256, shape, dtype=np.uint8)


@st.composite
def moves(draw: st.DrawFn) -> tuple[CacheLayout, CacheLayout, int, range, range]:
    """Two layouts of one model, the sequence's length, and what part of it is to move."""
    num_kv_heads = draw(st.integers(1, 6))
    degrees = [*(tp for tp in range(1, 7) if num_kv_heads % tp == 0), 2 * num_kv_heads, 3 * num_kv_heads]
    num_layers, head_dim, itemsize = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))

    def layout() -> CacheLayout:
        return CacheLayout(
            num_layers,
            num_kv_heads,
            head_dim,
            itemsize,
            block_size=draw(st.integers(1, 9)),
            order=draw(st.sampled_from(["token-major", "head-major"])),
            tp=draw(st.sampled_from(degrees)),
        )

    num_tokens = draw(st.integers(1, 30))
    tokens = sorted(draw(st.tuples(st.integers(0, num_tokens), st.integers(0, num_tokens))))
    layers = sorted(draw(st.tuples(st.integers(0, num_layers), st.integers(0, num_layers))))
    whole = draw(st.booleans())
    source = layout()
    other_order: Order = "head-major" if source.order == "token-major" else "token-major"
    similar = [source, replace(source, order=other_order), replace(source, tp=draw(st.sampled_from(degrees)))]
    target = draw(st.sampled_from([*similar, layout(), layout()]))
    if whole:
        return source, target, num_tokens, range(num_tokens), range(num_layers)
    return source, target, num_tokens, range(*tokens), range(*layers)


@settings(max_examples=400, deadline=None)
@given(moves())
def test_plan_moves_every_wanted_byte_once_and_no_other(move: tuple[CacheLayout, CacheLayout, int, range, range]):
    source, target, num_tokens, tokens, layers = move
    cache = random_cache(source, num_tokens)
    assert faults(plan(source, target, tokens, layers), source, target, cache, tokens, layers) == []


@settings(max_examples=300, deadline=None)
@given(moves())
def test_plan_has_the_fewest_runs(move: tuple[CacheLayout, CacheLayout, int, range, range]):
    source, target, _, tokens, layers = move
    copies = plan(source, target, tokens, layers)
    assert set(copies) == merged_naively(copies, source.head_dim * source.itemsize)
    assert len(set(copies)) == len(copies)


@settings(max_examples=300, deadline=None)
@given(moves())
def test_replicas_share_the_work_evenly(
    move: tuple[CacheLayout, CacheLayout, int, range, range],
):
    source, target, _, tokens, layers = move
    loads: Counter[int] = Counter(dict.fromkeys(range(source.tp), 0))
    for copy in plan(source, target, tokens, layers):
        loads[copy.source_shard] += copy.nbytes
    one_head = 2 * source.num_layers * source.block_size * source.head_dim * source.itemsize
    for start in range(0, source.tp, source.num_replicas):
        shares = [loads[shard] for shard in range(start, start + source.num_replicas)]
        # One from taking turns, a second one from a first or last block that is wanted in part.
        assert max(shares) - min(shares) <= (2 * one_head if source.num_replicas > 1 else 0)


@pytest.mark.parametrize("order", ["token-major", "head-major"])
@pytest.mark.parametrize("tp", [1, 2, 8])
def test_equal_layouts_need_one_copy_a_block(order, tp: int) -> None:
    layout = replace(SMALL, order=order, tp=tp)
    copies = plan(layout, layout, range(20), range(2))
    assert copies == [Copy(s, o, 0, s, o, 0, layout.block_bytes) for s in range(tp) for o in range(5)]
    half = layout.block_bytes // 2
    assert plan(layout, layout, range(4, 8), range(1, 2)) == [Copy(s, 1, half, s, 1, half, half) for s in range(tp)]


def test_equal_layouts_cost_a_step_a_block() -> None:
    layout = CacheLayout(num_layers=64, num_kv_heads=64, head_dim=128, itemsize=2, block_size=16)
    copies = plan(layout, layout, range(100_000), range(64))
    assert len(copies) == 6250
    assert {copy.nbytes for copy in copies} == {layout.block_bytes}


def test_wider_target_blocks_take_a_run_for_each_plane() -> None:
    copies = plan(SMALL, replace(SMALL, block_size=8), range(8), range(2))
    assert len(copies) == 2 * 2 * 2  # source blocks, layers, K and V
    assert {copy.nbytes for copy in copies} == {SMALL.plane_bytes}


def test_orders_meet_at_the_corners_of_planes() -> None:
    # The last head of the last token, and the first of the first in the next plane, are neighbours in either order.
    copies = plan(SMALL, replace(SMALL, order="head-major"), range(4), range(2))
    units, corners = 2 * 2 * 4 * 4, 2 * 2 - 1
    assert len(copies) == units - corners
    assert sorted(copy.nbytes for copy in copies)[-corners - 1 :] == [SMALL.head_bytes] + [2 * SMALL.head_bytes] * 3


def test_replicated_source_serves_even_targets_without_crossing() -> None:
    source, target = replace(SMALL, tp=8), replace(SMALL, tp=16)
    pairs = {(copy.source_shard, copy.target_shard) for copy in plan(source, target, range(40), range(2))}
    assert sorted(target_shard for _, target_shard in pairs) == list(range(16))  # each meets one source shard
    assert set(Counter(source_shard for source_shard, _ in pairs).values()) == {2}


def test_replicated_source_takes_turns_for_a_single_target() -> None:
    copies = plan(replace(SMALL, tp=8), SMALL, range(16), range(2))
    assert {(copy.source_ordinal, copy.source_shard % 2) for copy in copies} == {(0, 0), (1, 1), (2, 0), (3, 1)}


def test_a_block_of_the_pool_is_a_block_of_the_layout() -> None:
    memory = KVMemory(num_blocks=1, num_layers=2, layer_bytes=2 * 4 * 4 * 3 * 2)
    try:
        assert memory.block_bytes == SMALL.block_bytes
        assert memory.layer_bytes == 2 * SMALL.plane_bytes
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"tp": 3}, "tp", "tp: 4 KV heads cannot be shared by 3 shards; use a divisor or a multiple"),
        ({"tp": 6}, "tp", "tp: 4 KV heads cannot be shared by 6 shards"),
        ({"tp": 0}, "tp", "tp: 0 is not positive"),
        ({"block_size": 0}, "block_size", "block_size: 0 is not positive"),
        ({"head_dim": -1}, "head_dim", "head_dim: -1 is not positive"),
        ({"order": "dim-major"}, "order", "order: 'dim-major' is not one of token-major, head-major"),
    ],
)
def test_impossible_layout_is_refused_by_field(change: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(BadLayout, match=message) as caught:
        replace(SMALL, **change)
    assert caught.value.field == field
    assert isinstance(caught.value, LayoutMismatch)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "itemsize"])
def test_layouts_of_different_caches_are_never_mapped(field: str) -> None:
    change: dict[str, Any] = {field: 8}
    other = replace(SMALL, **change)
    assert compatible(SMALL, other) == field
    with pytest.raises(BadLayout, match=f"{field}: {getattr(SMALL, field)} at the source, 8 at the target"):
        plan(SMALL, other, range(4), range(2))


def test_first_differing_field_is_named() -> None:
    assert compatible(SMALL, replace(SMALL, head_dim=5, num_layers=9)) == "num_layers"


def test_what_a_plan_bridges_is_compatible() -> None:
    assert compatible(SMALL, replace(SMALL, block_size=7, order="head-major", tp=2)) is None


@pytest.mark.parametrize(
    ("tokens", "layers", "field"),
    [
        (range(0, 8, 2), range(2), "tokens"),
        (range(-1, 8), range(2), "tokens"),
        (range(8), range(3), "layers"),
        (range(8), range(1, 0, -1), "layers"),
    ],
)
def test_impossible_part_is_refused(tokens: range, layers: range, field: str) -> None:
    with pytest.raises(BadLayout) as caught:
        plan(SMALL, SMALL, tokens, layers)
    assert caught.value.field == field


def swap_k_and_v(copies: list[Copy]) -> list[Copy]:
    plane = SMALL.plane_bytes
    return [
        copy._replace(source_offset=copy.source_offset + plane * (1 if copy.source_offset // plane % 2 == 0 else -1))
        for copy in copies
    ]


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (swap_k_and_v, "wrong bytes"),
        (lambda copies: copies[:-1], "exactly once"),
        (lambda copies: [*copies, copies[0]], "exactly once"),
        (lambda copies: [copies[0]._replace(nbytes=copies[0].nbytes - 1), *copies[1:]], "exactly once"),
        (lambda copies: [copies[0]._replace(source_ordinal=1), *copies[1:]], "wrong bytes"),
        (lambda copies: [copies[0]._replace(target_shard=1), *copies[1:]], "exactly once"),
        (lambda copies: [copies[0]._replace(source_offset=SMALL.block_bytes - 1), *copies[1:]], "leaves its block"),
    ],
)
def test_planted_bug_in_a_plan_is_found(plant: Callable[[list[Copy]], list[Copy]], message: str) -> None:
    target = replace(SMALL, tp=2, order="head-major", block_size=2)
    copies = plan(SMALL, target, range(7), range(2))
    cache = random_cache(SMALL, 7)
    assert faults(copies, SMALL, target, cache, range(7), range(2)) == []
    assert any(message in fault for fault in faults(plant(copies), SMALL, target, cache, range(7), range(2)))


def test_planted_split_is_more_than_the_fewest_runs() -> None:
    [copy] = plan(SMALL, SMALL, range(4), range(2))
    unit = SMALL.head_bytes
    split = [
        copy._replace(nbytes=unit),
        copy._replace(source_offset=unit, target_offset=unit, nbytes=copy.nbytes - unit),
    ]
    assert merged_naively(split, unit) == {copy}
