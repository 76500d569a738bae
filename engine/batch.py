"""A step's sequences as flat arrays: the ragged batch, built with numpy in one go.

sequence      A     B        C
token_ids     a     b b b    c c        all new tokens, one sequence after another
cu_seqlens_q  0     1        4      6   where each begins, and the end
context_lens  5     3        40         tokens in the cache once these are written

Drafted tokens stand behind the others of their sequence, those of a tree too: each has a slot of its own, and the
position that it has on its path.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from ..core.errors import InternalError
from .draft_tree import MAX_TREE_ROWS, depths, is_tree, seen_bits
from .interface import ScheduledSeq
from .sequence import blocks_for

Ints = npt.NDArray[np.int64]

CAUSAL = -1  # as in `kernels.paged_attention.tree`


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """token_ids, positions, slot_mapping: [num_tokens]; block_table [num_seqs, longest], short rows filled with their
    own first block. sampled_rows: for each entry that samples its last row, and before that one for each drafted token.
    fresh_blocks: blocks that the step enters at their first slot and does not fill. tree [num_tokens]: which new tokens
    of its sequence each one sees (`kernels.paged_attention.tree`); None where all drafts are chains.
    """

    token_ids: Ints
    positions: Ints
    slot_mapping: Ints
    cu_seqlens_q: Ints
    context_lens: Ints
    block_table: Ints
    sampled_rows: Ints
    fresh_blocks: Ints
    tree: Ints | None = None


def build_batch(entries: list[ScheduledSeq], block_size: int) -> Batch:
    """Raises InternalError for an entry that has nothing to compute or no block for a token."""
    query_lens = np.array([entry.num_step_tokens for entry in entries], dtype=np.int64)
    starts = np.array([entry.seq.num_computed_tokens for entry in entries], dtype=np.int64)
    context_lens = starts + query_lens
    block_table = _block_table(entries, blocks_for(int(context_lens.max()), block_size), block_size)
    cu_seqlens_q = np.concatenate(([0], np.cumsum(query_lens)))
    owners = np.repeat(np.arange(len(entries)), query_lens)
    places = np.arange(cu_seqlens_q[-1]) - cu_seqlens_q[owners] + starts[owners]
    slot_mapping = block_table[owners, places // block_size] * block_size + places % block_size
    positions, tree = _branches(entries, cu_seqlens_q, places)
    sampled = np.array([1 + len(entry.draft) if entry.sample else 0 for entry in entries], dtype=np.int64)
    return Batch(
        token_ids=_token_ids(entries),
        positions=positions,
        slot_mapping=slot_mapping,
        cu_seqlens_q=cu_seqlens_q,
        context_lens=context_lens,
        block_table=block_table,
        sampled_rows=_last_rows(cu_seqlens_q, sampled),
        fresh_blocks=_fresh_blocks(starts, context_lens, block_table, block_size),
        tree=tree,
    )


def _branches(entries: list[ScheduledSeq], cu_seqlens_q: Ints, places: Ints) -> tuple[Ints, Ints | None]:
    """Positions of all tokens, which stand at `places` in their sequences, and `Batch.tree`."""
    if not any(entry.parents for entry in entries):
        return places, None
    positions, tree = places.copy(), np.full(len(places), CAUSAL, dtype=np.int64)
    for entry, start, stop in zip(entries, cu_seqlens_q[:-1], cu_seqlens_q[1:], strict=True):
        if entry.parents:
            first = stop - len(entry.draft)
            positions[first:stop] = positions[first - 1] + 1 + np.array(depths(entry.parents))
            tree[first:stop] = seen_bits(entry.parents, int(first - start))
    return positions, tree


def _token_ids(entries: list[ScheduledSeq]) -> Ints:
    return np.array(list(chain.from_iterable(map(_new_tokens, entries))), dtype=np.int64)


def _new_tokens(entry: ScheduledSeq) -> list[int]:
    start = entry.seq.num_computed_tokens
    tokens = entry.seq.tokens(start, start + entry.num_new_tokens)
    return [*tokens, *entry.draft] if entry.draft else tokens


def _last_rows(cu_seqlens_q: Ints, counts: Ints) -> Ints:
    """The last `counts` rows of each sequence, ascending."""
    ends = np.cumsum(counts)
    rows: Ints = np.repeat(cu_seqlens_q[1:] - ends, counts) + np.arange(ends[-1])
    return rows


def _block_table(entries: list[ScheduledSeq], width: int, block_size: int) -> Ints:
    table = np.empty((len(entries), width), dtype=np.int64)
    for row, entry in zip(table, entries, strict=True):
        seq = entry.seq
        needed = blocks_for(seq.num_computed_tokens + entry.num_step_tokens, block_size)
        blocks = seq.block_table[:needed]
        if len(blocks) < needed or entry.num_new_tokens < 1 or entry.num_new_tokens > seq.num_uncomputed_tokens:
            raise InternalError(
                f"request {seq.key}: {entry.num_new_tokens} tokens to compute after {seq.num_computed_tokens} of "
                f"{seq.num_tokens}, with {len(blocks)} blocks of {needed}"
            )
        if entry.draft and (seq.sample_choices or not entry.sample):
            raise InternalError(f"request {seq.key}: {len(entry.draft)} drafted tokens, but not behind one choice")
        if entry.parents and (not is_tree(entry.parents, len(entry.draft)) or entry.num_step_tokens > MAX_TREE_ROWS):
            raise InternalError(
                f"request {seq.key}: parents {entry.parents} of {len(entry.draft)} drafted tokens; a tree has up to "
                f"{MAX_TREE_ROWS} tokens with those before it, and a parent stands before its children"
            )
        row[:needed] = blocks
        row[needed:] = blocks[0]
    return table


def _fresh_blocks(starts: Ints, context_lens: Ints, block_table: Ints, block_size: int) -> Ints:
    last = context_lens // block_size
    entered = (context_lens % block_size != 0) & (starts <= last * block_size)
    fresh: Ints = block_table[entered, last[entered]]
    return fresh
