"""Paged attention of sequences with few new tokens, in Triton.

Grid (short sequences, KV heads, splits). A program reads its part of one sequence's keys and values of one KV head,
once, for all query heads that share it and all new tokens. With one split it writes the result; with several
(FlashDecoding, Dao et al. 2023) it writes its part of the sum and the logarithm of its weight, and `_reduce` (grid:
short sequences, new tokens, query heads) adds the parts up in a fixed order.

Roofline: 2 · head_dim · itemsize bytes a key and KV head, 4 · head_dim · GROUP operations for each new token: with 8
heads a KV head and bfloat16, 8 operations a byte. Bound by memory; splits are there to have enough loads in flight.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..choice import next_power_of_two
from .call import Call
from .device_plan import choose_splits, num_processors
from .key_loop import attend, read_queries, write_rows
from .plan import SHORT_QUERY
from .tuning import Setting, tuned

_SETTINGS: list[Setting] = [
    ({"BLOCK_KEYS": 32}, 2, 5),
    ({"BLOCK_KEYS": 32}, 4, 7),
    ({"BLOCK_KEYS": 64}, 2, 5),
    ({"BLOCK_KEYS": 64}, 4, 3),
    ({"BLOCK_KEYS": 64}, 4, 5),
    ({"BLOCK_KEYS": 64}, 4, 7),
    ({"BLOCK_KEYS": 128}, 4, 3),
    ({"BLOCK_KEYS": 128}, 4, 5),
    ({"BLOCK_KEYS": 128}, 8, 5),
]


def attend_short(call: Call) -> None:
    """Fill the rows of `call.out` that belong to the plan's short sequences."""
    plan, q = call.plan, call.q
    num_seqs, num_heads, head_dim = len(plan.short_seqs), q.shape[1], q.shape[2]
    num_splits = plan.num_splits or _splits(call)
    num_partials = num_seqs * plan.max_short_query * num_heads * num_splits
    partials = partial_logs = None
    if num_splits > 1:
        partials = torch.empty(num_partials, head_dim, dtype=torch.float32, device=q.device)
        partial_logs = torch.empty(num_partials, dtype=torch.float32, device=q.device)
    _decode[(num_seqs, call.num_kv_heads, num_splits)](
        q,
        call.kv_pool,
        call.kv_scales,
        call.tree,
        call.out,
        partials,
        partial_logs,
        plan.short_seqs,
        plan.cu_seqlens_q,
        plan.context_lens,
        plan.block_table,
        *q.stride()[:2],
        plan.block_table.stride(0),
        call.layer,
        call.scale * math.log2(math.e),
        plan.max_short_query,
        **call.constants(),
        TREE_WIDTH=SHORT_QUERY,
        BLOCK_ROWS=max(16, next_power_of_two(plan.max_short_query * call.group)),
    )
    if partials is not None:
        _reduce[(num_seqs, plan.max_short_query, num_heads)](
            partials,
            partial_logs,
            call.out,
            plan.short_seqs,
            plan.cu_seqlens_q,
            num_splits,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            DIMS=next_power_of_two(head_dim),
            SPLITS=next_power_of_two(num_splits),
        )


def _splits(call: Call) -> int:
    plan = call.plan
    most_keys = plan.max_context_len
    if call.window is not None:
        most_keys = min(most_keys, call.window + plan.max_short_query)
    return choose_splits(len(plan.short_seqs), call.num_kv_heads, most_keys, num_processors(call.q.device))


@tuned(_SETTINGS, interpreted={"BLOCK_KEYS": 32}, key=("BLOCK_ROWS",))
@triton.jit(do_not_specialize=["layer", "max_query"])
def _decode(
    q_at,
    kv_pool,
    kv_scales,
    tree,
    out,
    partials,
    partial_logs,
    short_seqs,
    cu_seqlens_q,
    context_lens,
    block_table,
    q_row_stride,
    q_head_stride,
    table_stride,
    layer,
    log2_scale,
    max_query,
    NUM_LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    WINDOW: tl.constexpr,
    TREE_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    place, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq = tl.load(short_seqs + place).to(tl.int64)
    first_token = tl.load(cu_seqlens_q + seq)
    query_len = tl.load(cu_seqlens_q + seq + 1) - first_token
    context_len = tl.load(context_lens + seq)
    earlier = context_len - query_len
    rows = tl.arange(0, BLOCK_ROWS)
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    tokens, is_row = (first_token + queries).to(tl.int64), queries < query_len
    q = read_queries(q_at, tokens, heads, is_row, q_row_stride, q_head_stride, HEAD_DIM, DIMS)
    tree_bits = None
    depths = queries
    if tree is not None:
        tree_bits = tl.load(tree + tokens, mask=is_row, other=-1)
        depths = _num_ancestors(tree_bits, queries, TREE_WIDTH)
    start, full_stop, stop = _key_range(split, tl.num_programs(2), earlier, context_len, WINDOW, BLOCK_KEYS)

    state = (
        tl.zeros((BLOCK_ROWS, DIMS), tl.float32),
        tl.full((BLOCK_ROWS,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_ROWS,), tl.float32),
    )
    table = block_table + seq * table_stride
    state = attend(
        state, q, queries, tree_bits, depths, kv_pool, kv_scales, table, start, full_stop, earlier, context_len, layer,
        kv_head, log2_scale, NUM_LAYERS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, DIMS, WINDOW, BLOCK_KEYS, False,
    )  # fmt: skip
    acc, row_max, row_sum = attend(
        state, q, queries, tree_bits, depths, kv_pool, kv_scales, table, full_stop, stop, earlier, context_len, layer,
        kv_head, log2_scale, NUM_LAYERS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, DIMS, WINDOW, BLOCK_KEYS, True,
    )  # fmt: skip
    row_sum = tl.where(row_sum > 0, row_sum, 1.0)
    acc /= row_sum[:, None]
    if partials is None:
        write_rows(out, acc, tokens * (NUM_KV_HEADS * GROUP) + heads, is_row, HEAD_DIM, DIMS)
    else:
        part = (place.to(tl.int64) * max_query + queries) * (NUM_KV_HEADS * GROUP) + heads
        part = part * tl.num_programs(2) + split
        write_rows(partials, acc, part, is_row, HEAD_DIM, DIMS)
        tl.store(partial_logs + part, row_max + tl.log2(row_sum), mask=is_row)


@triton.jit
def _num_ancestors(tree_bits, queries, TREE_WIDTH: tl.constexpr):
    """How many new tokens before it each row sees."""
    places = tl.arange(0, TREE_WIDTH)
    is_seen = ((tree_bits[:, None] >> places.to(tl.int64)[None, :]) & 1) != 0
    return tl.sum((is_seen & (places[None, :] < queries[:, None])).to(tl.int32), 1)


@triton.jit
def _key_range(
    split,
    num_splits,
    earlier,
    context_len,
    WINDOW: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A split's keys: [start, full_stop) are seen by all rows, [full_stop, stop) perhaps not. Empty when start >= stop.

    The keys of the window are cut into equal parts of whole blocks of keys; the last parts may be empty.
    """
    first = 0
    if WINDOW > 0:
        first = tl.maximum(earlier + 1 - WINDOW, 0) // BLOCK_KEYS * BLOCK_KEYS
    part = tl.cdiv(tl.cdiv(context_len - first, num_splits), BLOCK_KEYS) * BLOCK_KEYS
    start = first + split * part
    stop = tl.minimum(start + part, context_len)
    if WINDOW > 0:
        return start, start, stop
    return start, tl.maximum(start, tl.minimum(stop, earlier // BLOCK_KEYS * BLOCK_KEYS)), stop


@triton.jit
def _reduce(
    partials,
    partial_logs,
    out,
    short_seqs,
    cu_seqlens_q,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    place, query, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq = tl.load(short_seqs + place)
    token = tl.load(cu_seqlens_q + seq) + query
    if token < tl.load(cu_seqlens_q + seq + 1):
        splits, dims = tl.arange(0, SPLITS), tl.arange(0, DIMS)
        parts = ((place.to(tl.int64) * tl.num_programs(1) + query) * NUM_HEADS + head) * num_splits + splits
        logs = tl.load(partial_logs + parts, mask=splits < num_splits, other=float("-inf"))
        highest = tl.max(logs, 0)
        weights = tl.exp2(logs - tl.where(highest == float("-inf"), 0.0, highest))
        is_number = (splits < num_splits)[:, None] & (dims < HEAD_DIM)[None, :]
        values = tl.load(partials + parts[:, None] * HEAD_DIM + dims[None, :], mask=is_number, other=0.0)
        total = tl.sum(weights, 0)
        row = tl.sum(values * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
        at = out + (token.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + dims
        tl.store(at, row.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
