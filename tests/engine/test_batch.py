from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import InternalError
from penstock.core.ids import AttemptKey, BlockId
from penstock.engine.batch import Batch, build_batch
from penstock.engine.interface import ScheduledSeq
from penstock.engine.sequence import Sequence, blocks_for
from penstock.protocol.sampling import SamplingParams

BLOCK_SIZE = 4


def entry(prompt: int, computed: int, new: int, first_block: int, output: int = 0) -> ScheduledSeq:
    """Token i of the sequence has id 100 + i; its blocks are numbered upwards from `first_block`, by twos."""
    ids = list(range(100, 100 + prompt + output))
    seq = Sequence(AttemptKey("r", 0), 0, ids[:prompt], SamplingParams(), b"", 0.0, 1.0, ids[prompt:])
    blocks = blocks_for(computed + new, BLOCK_SIZE)
    seq.block_table = [BlockId(first_block + 2 * i) for i in range(blocks)]
    seq.num_computed_tokens = computed
    return ScheduledSeq(seq, new)


def lists(batch: Batch) -> dict[str, list[int]]:
    return {name: getattr(batch, name).tolist() for name in batch.__slots__ if name != "tree"}


def test_batch_lays_sequences_end_to_end() -> None:
    entries = [entry(6, 5, 1, 10), entry(3, 0, 3, 20), entry(9, 2, 4, 30), entry(6, 8, 1, 40, output=3)]
    assert lists(build_batch(entries, BLOCK_SIZE)) == {
        "token_ids": [105, 100, 101, 102, 102, 103, 104, 105, 108],
        "positions": [5, 0, 1, 2, 2, 3, 4, 5, 8],
        "slot_mapping": [49, 80, 81, 82, 122, 123, 128, 129, 176],
        "cu_seqlens_q": [0, 1, 4, 8, 9],
        "context_lens": [6, 3, 6, 9],
        "block_table": [[10, 12, 10], [20, 20, 20], [30, 32, 30], [40, 42, 44]],
        "sampled_rows": [0, 3, 8],
        "fresh_blocks": [20, 32, 44],  # the first sequence entered its last block in an earlier step
    }


def test_filled_block_is_not_fresh() -> None:
    assert lists(build_batch([entry(8, 0, 8, 0)], BLOCK_SIZE))["fresh_blocks"] == []
    assert lists(build_batch([entry(8, 4, 4, 0)], BLOCK_SIZE))["fresh_blocks"] == []


def test_tokens_of_a_tree_have_slots_in_a_row_and_the_positions_of_their_paths() -> None:
    tree = entry(8, 7, 1, 10)
    branched = ScheduledSeq(tree.seq, 1, (1, 2, 3, 4), (-1, 0, -1, 2))
    tree.seq.block_table = [BlockId(10), BlockId(12), BlockId(14)]
    batch = build_batch([entry(3, 0, 3, 20), branched], BLOCK_SIZE)
    assert batch.positions.tolist() == [0, 1, 2, 7, 8, 9, 8, 9]
    assert batch.slot_mapping.tolist() == [80, 81, 82, 51, 56, 57, 58, 59]
    assert batch.tree is not None
    assert batch.tree.tolist() == [-1, -1, -1, -1, 0b11, 0b111, 0b1001, 0b11001]
    assert build_batch([ScheduledSeq(tree.seq, 1, (1, 2))], BLOCK_SIZE).tree is None


@pytest.mark.parametrize(
    ("computed", "new", "num_blocks"),
    [(0, 5, 1), (4, 1, 1), (5, 0, 2), (5, 2, 2)],
    ids=["block", "next", "none", "past"],
)
def test_entry_that_cannot_run_is_refused(computed: int, new: int, num_blocks: int) -> None:
    bad = entry(6, computed, new, 0)
    bad.seq.block_table = bad.seq.block_table[:num_blocks]
    with pytest.raises(InternalError, match=f"request r#0: {new} tokens to compute after {computed} of 6"):
        build_batch([entry(2, 0, 2, 50), bad], BLOCK_SIZE)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=8))
def test_every_token_has_its_own_slot_in_its_own_block(spans: list[tuple[int, int, int]]) -> None:
    entries = [entry(start + new + more, start, new, 1000 * i) for i, (start, new, more) in enumerate(spans)]
    batch = build_batch(entries, BLOCK_SIZE)
    assert len(np.unique(batch.slot_mapping)) == len(batch.token_ids) == sum(new for _, new, _ in spans)
    for index, (start, new, _) in enumerate(spans):
        own = slice(*batch.cu_seqlens_q[index : index + 2])
        assert batch.positions[own].tolist() == list(range(start, start + new))
        assert (batch.slot_mapping[own] // BLOCK_SIZE // 1000 == index).all()
        assert (batch.block_table[index] // 1000 == index).all()
    assert len(batch.sampled_rows) == sum(more == 0 for _, _, more in spans)
