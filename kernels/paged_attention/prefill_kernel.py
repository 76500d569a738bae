"""Paged attention of sequences with many new tokens, in Triton: prompts and chunks of prompts.

Grid (tiles of the longest query, long sequences, KV heads); tiles behind a shorter query's end return at once. A
program computes one tile of new tokens for all query heads that share a KV head, against the keys up to its own end:
first those that all its rows see, without a mask, then those on the diagonal. Tiles with the most keys start first.

Roofline: 4 · head_dim operations for each visible pair of query head and key; a tile reads a key once for BLOCK_ROWS
rows, so with bfloat16 it does BLOCK_ROWS operations a byte: bound by the tensor cores from some 128 rows on an H100.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .call import Call
from .key_loop import attend, read_queries, write_rows
from .tuning import Setting, tuned

_SETTINGS: list[Setting] = [
    ({"BLOCK_ROWS": 64, "BLOCK_KEYS": 32}, 4, 5),
    ({"BLOCK_ROWS": 64, "BLOCK_KEYS": 64}, 4, 3),
    ({"BLOCK_ROWS": 64, "BLOCK_KEYS": 64}, 4, 5),
    ({"BLOCK_ROWS": 64, "BLOCK_KEYS": 128}, 4, 3),
    ({"BLOCK_ROWS": 128, "BLOCK_KEYS": 32}, 4, 5),
    ({"BLOCK_ROWS": 128, "BLOCK_KEYS": 64}, 4, 5),
    ({"BLOCK_ROWS": 128, "BLOCK_KEYS": 64}, 8, 3),
    ({"BLOCK_ROWS": 128, "BLOCK_KEYS": 64}, 8, 5),
    ({"BLOCK_ROWS": 128, "BLOCK_KEYS": 64}, 8, 7),
    ({"BLOCK_ROWS": 128, "BLOCK_KEYS": 128}, 8, 3),
]


def attend_long(call: Call) -> None:
    """Fill the rows of `call.out` that belong to the plan's long sequences."""
    plan, q = call.plan, call.q
    num_seqs, longest, num_kv_heads, group = len(plan.long_seqs), plan.max_long_query, call.num_kv_heads, call.group

    def grid(constants: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(longest, constants["BLOCK_ROWS"] // group), num_seqs, num_kv_heads

    _prefill[grid](
        q,
        call.kv_pool,
        call.kv_scales,
        call.out,
        plan.long_seqs,
        plan.cu_seqlens_q,
        plan.context_lens,
        plan.block_table,
        *q.stride()[:2],
        plan.block_table.stride(0),
        call.layer,
        call.scale * math.log2(math.e),
        **call.constants(),
    )


@tuned(_SETTINGS, interpreted={"BLOCK_ROWS": 32, "BLOCK_KEYS": 32})
@triton.jit(do_not_specialize=["layer"])
def _prefill(
    q_at,
    kv_pool,
    kv_scales,
    out,
    long_seqs,
    cu_seqlens_q,
    context_lens,
    block_table,
    q_row_stride,
    q_head_stride,
    table_stride,
    layer,
    log2_scale,
    NUM_LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    # Whole tokens only: where GROUP does not divide BLOCK_ROWS, the last rows of a tile are empty.
    TOKENS: tl.constexpr = BLOCK_ROWS // GROUP
    seq, kv_head = tl.load(long_seqs + tl.program_id(1)).to(tl.int64), tl.program_id(2)
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    first_token = tl.load(cu_seqlens_q + seq)
    query_len = tl.load(cu_seqlens_q + seq + 1) - first_token
    if first_query < query_len:
        context_len = tl.load(context_lens + seq)
        earlier = context_len - query_len
        rows = tl.arange(0, BLOCK_ROWS)
        queries, heads = first_query + rows // GROUP, kv_head * GROUP + rows % GROUP
        is_row = (rows < TOKENS * GROUP) & (queries < query_len)
        tokens = (first_token + queries).to(tl.int64)
        q = read_queries(q_at, tokens, heads, is_row, q_row_stride, q_head_stride, HEAD_DIM, DIMS)
        start, full_stop = 0, (earlier + first_query) // BLOCK_KEYS * BLOCK_KEYS
        if WINDOW > 0:
            start = tl.maximum(earlier + first_query + 1 - WINDOW, 0) // BLOCK_KEYS * BLOCK_KEYS
            full_stop = start
        stop = tl.minimum(earlier + first_query + TOKENS, context_len)

        state = (
            tl.zeros((BLOCK_ROWS, DIMS), tl.float32),
            tl.full((BLOCK_ROWS,), float("-inf"), tl.float32),
            tl.zeros((BLOCK_ROWS,), tl.float32),
        )
        table = block_table + seq * table_stride
        state = attend(
            state, q, queries, None, queries, kv_pool, kv_scales, table, start, full_stop, earlier, context_len, layer,
            kv_head, log2_scale, NUM_LAYERS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, DIMS, WINDOW, BLOCK_KEYS, False,
        )  # fmt: skip
        acc, _row_max, row_sum = attend(
            state, q, queries, None, queries, kv_pool, kv_scales, table, full_stop, stop, earlier, context_len, layer,
            kv_head, log2_scale, NUM_LAYERS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, DIMS, WINDOW, BLOCK_KEYS, True,
        )  # fmt: skip
        acc /= tl.where(row_sum > 0, row_sum, 1.0)[:, None]
        write_rows(out, acc, tokens * (NUM_KV_HEADS * GROUP) + heads, is_row, HEAD_DIM, DIMS)
