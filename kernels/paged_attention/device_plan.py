"""The plan of a step as the GPU kernels read it: the same arrays as `plan.AttentionPlan`, on the device.

    1. PlanBuffers is made once for the largest batch; its memory never moves, so a captured CUDA graph may read it.
    2. fill() copies a step's arrays into it and returns a DevicePlan, whose tensors are views of the buffers.
    3. The next fill() replaces what the earlier plan shows; copies are ordered on the current stream, after the
       kernels that read it.

No mask is built: the kernels work it out from positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from ...core.errors import InternalError
from .plan import SHORT_QUERY, Ints

MAX_SPLITS = 64
SPLIT_KEYS = 256  # fewer keys than this are not worth a program and its part of the reduction
PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True, slots=True, eq=False)
class DevicePlan:
    """A ragged batch on the device; index tensors are int32.

    cu_seqlens_q [num_seqs + 1], context_lens [num_seqs], block_table [num_seqs, longest] (rows may be strided): as in
    AttentionPlan; nothing behind a sequence's last block is read. short_seqs, long_seqs: which sequences have at most
    `SHORT_QUERY` new tokens, and which more. The maxima are bounds, those of a captured graph for all batches it is
    replayed with. num_splits: parts that the context of a short query is cut into; None lets `choose_splits` decide.

    A sequence with new tokens and a context of 0 is padding: its rows of the result are zeros.
    """

    cu_seqlens_q: torch.Tensor
    context_lens: torch.Tensor
    block_table: torch.Tensor
    short_seqs: torch.Tensor
    long_seqs: torch.Tensor
    num_tokens: int
    max_short_query: int
    max_long_query: int
    max_context_len: int
    num_splits: int | None = None


class PlanBuffers:
    """Device memory of the plans of batches of up to `max_seqs` sequences of up to `max_blocks` blocks."""

    def __init__(self, max_seqs: int, max_blocks: int, device: torch.device) -> None:
        self._per_seq = torch.zeros(4, max_seqs + 1, dtype=torch.int32, device=device)
        self._block_table = torch.zeros(max_seqs, max_blocks, dtype=torch.int32, device=device)

    def fill(
        self, cu_seqlens_q: Ints, context_lens: Ints, block_table: Ints, num_splits: int | None = None
    ) -> DevicePlan:
        """The plan of one step; arrays as in AttentionPlan. Raises InternalError for a batch beyond the buffers."""
        num_seqs, width = block_table.shape
        max_seqs, max_blocks = self._block_table.shape
        if num_seqs > max_seqs or width > max_blocks:
            raise InternalError(
                f"a batch of {num_seqs} sequences of {width} blocks, the buffers hold {max_seqs} of {max_blocks}"
            )
        query_lens = np.diff(cu_seqlens_q)
        short, long = np.flatnonzero(query_lens <= SHORT_QUERY), np.flatnonzero(query_lens > SHORT_QUERY)
        staged = np.zeros(self._per_seq.shape, dtype=np.int32)
        for row, values in zip(staged, (cu_seqlens_q, context_lens, short, long), strict=True):
            row[: len(values)] = values
        upload(staged, self._per_seq)
        upload(block_table.astype(np.int32), self._block_table[:num_seqs, :width])
        return DevicePlan(
            cu_seqlens_q=self._per_seq[0, : num_seqs + 1],
            context_lens=self._per_seq[1, :num_seqs],
            block_table=self._block_table[:num_seqs, :width],
            short_seqs=self._per_seq[2, : len(short)],
            long_seqs=self._per_seq[3, : len(long)],
            num_tokens=int(cu_seqlens_q[-1]),
            max_short_query=int(query_lens[short].max(initial=0)),
            max_long_query=int(query_lens[long].max(initial=0)),
            max_context_len=int(context_lens.max(initial=0)),
            num_splits=num_splits,
        )

    def widest(self, plan: DevicePlan, max_context_len: int) -> DevicePlan:
        """What `plan`, the latest of these buffers, says of every later one with as many sequences and new tokens."""
        table = self._block_table[: plan.block_table.shape[0]]
        return replace(plan, block_table=table, max_context_len=max_context_len)


def upload(values: npt.NDArray[np.generic], target: torch.Tensor) -> None:
    """Copy into device memory without waiting, ordered on the current stream."""
    staged = torch.from_numpy(values)
    if target.device.type == "cuda":
        # Torch reuses pinned memory only after the copy from it has run, so the host need not wait.
        staged = staged.pin_memory()
    target.copy_(staged, non_blocking=True)


def build_device_plan(
    cu_seqlens_q: Ints, context_lens: Ints, block_table: Ints, device: torch.device, num_splits: int | None = None
) -> DevicePlan:
    """The plan of one step in memory of its own."""
    num_seqs, width = block_table.shape
    return PlanBuffers(num_seqs, width, device).fill(cu_seqlens_q, context_lens, block_table, num_splits)


def choose_splits(num_seqs: int, num_kv_heads: int, max_keys: int, num_processors: int) -> int:
    """Into how many parts to cut the keys of short queries: a power of two, the same for the same numbers.

    As many as give every processor `PROGRAMS_PER_PROCESSOR` programs, but none of fewer than `SPLIT_KEYS` keys.
    max_keys: the most that a sequence of the batch reads. The order of a sum depends on the number of parts, so a
    caller that needs the same bits in every batch fixes `DevicePlan.num_splits`.
    """
    programs = num_seqs * num_kv_heads
    wanted = PROGRAMS_PER_PROCESSOR * num_processors // max(1, programs)
    most = max(1, min(wanted, max_keys // SPLIT_KEYS, MAX_SPLITS))
    return 1 << (most.bit_length() - 1)


@lru_cache(maxsize=16)
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 elsewhere, where programs run one after the other."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
