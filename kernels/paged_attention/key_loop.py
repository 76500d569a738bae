"""What both attention kernels do for one tile of queries: walk over keys in the pool, keeping a running softmax.

A tile holds the rows of one KV head: the GROUP query heads that share it, for several new tokens, one after the other
(row r is token r // GROUP, head r % GROUP), so a key is read once for all of them. Softmax is kept in base 2, online
(Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022): row_max, row_sum and an unnormalised sum of values.

A slot behind the context is never read: its bits may be a NaN, and 0 · NaN is NaN. 8-bit keys and values enter the
products as they are, exact in 16 bits; the scale of a key's block multiplies its column of scores, that of a value's
block its column of weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tuning import IS_INTERPRETED

_IS_INTERPRETED: tl.constexpr = tl.constexpr(IS_INTERPRETED)


@triton.jit
def slot_offsets(
    block_ids,
    layer,
    part: tl.constexpr,
    slots,
    head,
    NUM_LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Elements from the pool's start to the first dimension of a head. Twin: `addressing.slot_offsets`."""
    row = (block_ids.to(tl.int64) * NUM_LAYERS + layer) * 2 + part
    return ((row * BLOCK_SIZE + slots) * NUM_KV_HEADS + head) * HEAD_DIM


@triton.jit
def scale_offsets(
    block_ids,
    layer,
    part: tl.constexpr,
    head,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
):
    """Elements from the start of the scales. Twin: `addressing.scale_offsets`."""
    return ((block_ids.to(tl.int64) * NUM_LAYERS + layer) * 2 + part) * NUM_KV_HEADS + head


@triton.jit
def read_queries(
    q_at,
    tokens,
    heads,
    is_row,
    row_stride,
    head_stride,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    """[rows, DIMS] of q; zeros where there is no row, and in dimensions that only fill up to a power of two."""
    dims = tl.arange(0, DIMS)
    is_number = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = tokens.to(tl.int64) * row_stride + heads * head_stride
    return tl.load(q_at + offsets[:, None] + dims[None, :], mask=is_number, other=0.0)


@triton.jit
def write_rows(
    out,
    values,
    places,
    is_row,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Write values [rows, DIMS] to rows `places` (int64) of out [n, HEAD_DIM], which is dense."""
    dims = tl.arange(0, DIMS)
    is_number = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    at = out + places[:, None] * HEAD_DIM + dims[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=is_number)


@triton.jit
def product(a, b, added):
    """a · b + added, float32; `a` and `b` are of one type, float32 is not cut to TF32."""
    if _IS_INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, added, input_precision="ieee")


@triton.jit
def read_keys(kv_pool, offsets, dims, is_read, q):
    """[keys, DIMS] of the pool in the type of q, exactly: 8 bits go through float32, which holds all of them."""
    numbers = tl.load(kv_pool + offsets[:, None] + dims[None, :], mask=is_read, other=0.0)
    return numbers if numbers.dtype == q.dtype else numbers.to(tl.float32).to(q.dtype)


@triton.jit
def is_visible(
    keys,
    queries,
    tree_bits,
    depths,
    earlier,
    context_len,
    WINDOW: tl.constexpr,
):
    """[rows, keys]: whether a query sees a key; `queries` and `depths` [rows] as in `attend`."""
    new = keys - earlier
    visible = (keys < context_len)[None, :] & (new[None, :] <= queries[:, None])
    if tree_bits is not None:
        place = tl.minimum(tl.maximum(new, 0), 63).to(tl.int64)
        visible &= (new < 0)[None, :] | (((tree_bits[:, None] >> place[None, :]) & 1) != 0)
    if WINDOW > 0:
        visible &= new[None, :] > depths[:, None] - WINDOW
    return visible


@triton.jit
def attend(
    state,
    q,
    queries,
    tree_bits,
    depths,
    kv_pool,
    kv_scales,
    table,
    start,
    stop,
    earlier,
    context_len,
    layer,
    kv_head,
    log2_scale,
    NUM_LAYERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Add keys [start, stop) to `state`: (sum of values [rows, DIMS], row_max [rows], row_sum [rows]), all float32.

    queries: a row's place among the new tokens of its sequence. depths: the same where they form a chain, the number
    of ancestors in a tree. IS_MASKED: whether some row may not see some key, or a key lies behind the context.
    """
    acc, row_max, row_sum = state
    dims = tl.arange(0, DIMS)
    is_dim = (dims < HEAD_DIM)[None, :]
    for first in range(start, stop, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        in_context = keys < context_len
        block_ids = tl.load(table + keys // BLOCK_SIZE, mask=in_context, other=0)
        slots = keys % BLOCK_SIZE
        is_read = in_context[:, None] & is_dim if IS_MASKED else is_dim
        k_at = slot_offsets(block_ids, layer, 0, slots, kv_head, NUM_LAYERS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        k = read_keys(kv_pool, k_at, dims, is_read, q)
        scores = product(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_KEYS), tl.float32)) * log2_scale
        if kv_scales is not None:
            k_scale_at = scale_offsets(block_ids, layer, 0, kv_head, NUM_LAYERS, NUM_KV_HEADS)
            scores *= tl.load(kv_scales + k_scale_at, mask=in_context, other=0.0)[None, :]
        if IS_MASKED:
            visible = is_visible(keys, queries, tree_bits, depths, earlier, context_len, WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen nothing yet keeps a maximum of -inf; -inf - -inf would be NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(row_max - shift)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        row_max = new_max
        v_at = slot_offsets(block_ids, layer, 1, slots, kv_head, NUM_LAYERS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        v = read_keys(kv_pool, v_at, dims, is_read, q)
        if kv_scales is not None:
            v_scale_at = scale_offsets(block_ids, layer, 1, kv_head, NUM_LAYERS, NUM_KV_HEADS)
            weights *= tl.load(kv_scales + v_scale_at, mask=in_context, other=0.0)[None, :]
        acc = product(weights.to(q.dtype), v, acc * shrink[:, None])
    return acc, row_max, row_sum
