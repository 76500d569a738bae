"""What attention needs to know about a ragged batch, worked out once for a step and shared by all layers.

Sequences with few new tokens (`SHORT_QUERY` at most; decode has one) are grouped into buckets by query length (powers
of two) and by blocks in use (powers of four); a bucket is padded to its longest and computed at once. A longer query
(a prompt chunk) is computed alone, in tiles of queries, each against the keys up to its own end: half of a causal
square is never touched.

Padding repeats blocks of the sequence itself, never another's: see `padded`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

SHORT_QUERY = 16
TILE = 64  # queries computed against one span of keys; larger tiles compute more of what the mask hides

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ShortQueries:
    """A bucket of sequences, each padded to `query_len` queries and `key_len` keys.

    rows: rows of q, [batch · query_len], or a slice when they follow each other. kept: which of them are no padding;
    None when all are. mask: added to the scores, [batch, 1, query_len · group (1 when query_len is 1), key_len].
    """

    batch: int
    query_len: int
    key_len: int
    rows: slice | torch.Tensor
    kept: torch.Tensor | None
    block_rows: torch.Tensor  # [2 (K, V) · batch · blocks]
    mask: torch.Tensor
    window_mask: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Queries [start, stop) of a long query against keys [key_start, key_stop);

    mask [stop - start, key_stop - key_start].
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LongQuery:
    """One sequence with many new tokens, which are rows [start, stop) of q."""

    start: int
    stop: int
    block_rows: torch.Tensor  # [2 (K, V) · blocks]
    tiles: tuple[Tile, ...]
    window_tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """A ragged batch and how to compute it.

    cu_seqlens_q [num_seqs + 1]: first query row of each sequence, and the end. context_lens [num_seqs]: tokens of the
    sequence in the pool, those of this step included. block_table [num_seqs, longest]: entries behind a sequence's
    last block repeat its first one. window: the sliding window the plan is good for.
    """

    cu_seqlens_q: Ints
    context_lens: Ints
    block_table: Ints
    window: int | None
    short: tuple[ShortQueries, ...]
    long: tuple[LongQuery, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.cu_seqlens_q[-1])


@dataclass(frozen=True, slots=True)
class PoolShape:
    """The numbers of a KV pool and of its queries that a plan depends on; `group` is query heads per KV head."""

    num_layers: int
    block_size: int
    group: int
    dtype: torch.dtype


def build_plan(
    cu_seqlens_q: Ints,
    context_lens: Ints,
    block_table: Ints,
    shape: PoolShape,
    window: int | None = None,
    tree: Ints | None = None,
) -> AttentionPlan:
    """The plan of one step; arrays as in AttentionPlan. tree [num_tokens]: which new tokens see which, as the module
    `tree` packs it, None for chains; it is in the masks, so that attention need not be told again.
    """
    query_lens = np.diff(cu_seqlens_q)
    is_short = query_lens <= SHORT_QUERY
    batch = _Batch(cu_seqlens_q, query_lens, context_lens, block_table, shape, window, tree)
    short = tuple(_short_queries(batch, members) for members in _buckets(batch, np.flatnonzero(is_short)))
    long = tuple(_long_query(batch, int(index)) for index in np.flatnonzero(~is_short))
    return AttentionPlan(cu_seqlens_q, context_lens, block_table, window, short, long)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    cu_seqlens_q: Ints
    query_lens: Ints
    context_lens: Ints
    block_table: Ints
    shape: PoolShape
    window: int | None
    tree: Ints | None

    def block_rows(self, members: Ints, num_blocks: int) -> torch.Tensor:
        """Rows of the flat pool [num_blocks · num_layers · 2, …] from a layer's first on: all keys, then all values."""
        keys = self.block_table[members, :num_blocks].ravel() * (2 * self.shape.num_layers)
        return torch.from_numpy(np.concatenate((keys, keys + 1)))


def _buckets(batch: _Batch, members: Ints) -> list[Ints]:
    """`members` split into groups of like query length and like number of blocks, each in batch order."""
    if len(members) == 0:
        return []
    query_class = np.ceil(np.log2(batch.query_lens[members])).astype(np.int64)
    num_blocks = -(-batch.context_lens[members] // batch.shape.block_size)
    block_class = np.ceil(np.log2(num_blocks) / 2).astype(np.int64)
    keys = query_class * 64 + block_class
    return [members[keys == key] for key in np.unique(keys)]


def _short_queries(batch: _Batch, members: Ints) -> ShortQueries:
    shape = batch.shape
    query_lens, context_lens = batch.query_lens[members], batch.context_lens[members]
    query_len = int(query_lens.max())
    num_blocks = -(-int(context_lens.max()) // shape.block_size)
    steps = np.arange(query_len)
    # A padding query repeats the sequence's last one, so that it has keys to see.
    steps_in_seq = np.minimum(steps[None, :], query_lens[:, None] - 1)  # [batch, query_len]
    rows = (batch.cu_seqlens_q[members][:, None] + steps_in_seq).ravel()
    positions = context_lens[:, None] - query_lens[:, None] + steps_in_seq
    is_padded = bool((query_lens != query_len).any())
    key_len = num_blocks * shape.block_size
    seen = _seen_new(batch, members, steps_in_seq)
    mask = _mask(positions, key_len, None, shape, seen)
    return ShortQueries(
        batch=len(members),
        query_len=query_len,
        key_len=key_len,
        rows=_as_slice(rows),
        kept=torch.from_numpy(np.flatnonzero((steps[None, :] < query_lens[:, None]).ravel())) if is_padded else None,
        block_rows=batch.block_rows(members, num_blocks),
        mask=mask,
        window_mask=(
            _mask(positions, key_len, batch.window, shape, seen) if _exceeds(batch.window, context_lens) else mask
        ),
    )


def _seen_new(batch: _Batch, members: Ints, steps_in_seq: Ints) -> Ints | None:
    """[batch, query_len, query_len]: whether a query sees each new token of its sequence; None where all are chains."""
    if batch.tree is None:
        return None
    bits = batch.tree[batch.cu_seqlens_q[members][:, None] + steps_in_seq]
    new = np.arange(steps_in_seq.shape[1])
    seen: Ints = (bits[..., None] >> new & 1) * (new <= steps_in_seq[..., None])
    return seen


def _exceeds(window: int | None, context_lens: Ints) -> bool:
    return window is not None and bool((context_lens > window).any())


def _as_slice(rows: Ints) -> slice | torch.Tensor:
    first = int(rows[0])
    if len(rows) == 1 or bool((np.diff(rows) == 1).all()):
        return slice(first, first + len(rows))
    return torch.from_numpy(rows)


def _mask(
    positions: Ints, key_len: int, window: int | None, shape: PoolShape, seen: Ints | None = None
) -> torch.Tensor:
    """0 where the query that stands at `positions` [batch, query_len] sees the key, else -inf; shaped as
    ShortQueries.mask. seen: see `_seen_new`.
    """
    hidden = np.arange(key_len) > positions[..., None]
    if seen is not None:
        hidden |= _branches(positions, key_len, seen)
    if window is not None:
        hidden |= _behind(positions, key_len, window, seen)
    mask = torch.zeros(hidden.shape, dtype=shape.dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
    if positions.shape[1] > 1:
        mask = mask.repeat_interleave(shape.group, dim=1)
    return mask.unsqueeze(1)


def _branches(positions: Ints, key_len: int, seen: Ints) -> npt.NDArray[np.bool_]:
    """Keys [batch, query_len, key_len] of new tokens that are on no path to the query."""
    new = np.arange(key_len) - positions[:, :1, None]  # which new token a key is of; the first stands at positions[0]
    is_on_path = np.take_along_axis(
        seen, np.broadcast_to(new.clip(0, seen.shape[2] - 1), (*seen.shape[:2], key_len)), 2
    )
    branches: npt.NDArray[np.bool_] = (new >= 0) & (is_on_path == 0)
    return branches


def _behind(positions: Ints, key_len: int, window: int, seen: Ints | None) -> npt.NDArray[np.bool_]:
    """Keys [batch, query_len, key_len] that the window has left behind. In a tree it counts a query's own path."""
    keys = np.arange(key_len)
    if seen is None:
        behind: npt.NDArray[np.bool_] = keys <= positions[..., None] - window
        return behind
    first = positions[:, :1, None]
    depth = seen.sum(axis=2) - 1  # of each query
    new = (keys - first).clip(0, seen.shape[2] - 1)
    places = np.where(keys < first, keys, first + np.take_along_axis(depth[:, None], new, 2))
    left: npt.NDArray[np.bool_] = places <= first + depth[..., None] - window
    return left


def _long_query(batch: _Batch, index: int) -> LongQuery:
    start, stop = (int(row) for row in batch.cu_seqlens_q[index : index + 2])
    context_len = int(batch.context_lens[index])
    num_blocks = -(-context_len // batch.shape.block_size)
    tiles = _tiles(stop - start, context_len, None, batch.shape.dtype)
    return LongQuery(
        start=start,
        stop=stop,
        block_rows=batch.block_rows(np.array([index]), num_blocks),
        tiles=tiles,
        window_tiles=(
            _tiles(stop - start, context_len, batch.window, batch.shape.dtype)
            if batch.window is not None and context_len > batch.window
            else tiles
        ),
    )


def _tiles(query_len: int, context_len: int, window: int | None, dtype: torch.dtype) -> tuple[Tile, ...]:
    earlier = context_len - query_len
    tiles = []
    for start in range(0, query_len, TILE):
        stop = min(start + TILE, query_len)
        position = earlier + start  # of the tile's first query
        key_start = 0 if window is None else max(0, position - window + 1)
        reach = position - key_start
        strip = _strip(1 << max(reach - 1, 127).bit_length(), window, dtype)
        zero = strip.shape[1] - TILE
        mask = strip[: stop - start, zero - reach : zero + stop - start]
        tiles.append(Tile(start, stop, key_start, earlier + stop, mask))
    return tuple(tiles)


@lru_cache(maxsize=16)
def _strip(reach: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[TILE, reach + TILE]: the mask of any tile is a view of it. Column reach + j: the key j behind the first query.

    What a query sees depends on distance alone, so tiles of all sequences and steps share one strip.
    """
    distance = torch.arange(TILE)[:, None] - (torch.arange(reach + TILE) - reach)[None, :]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
