"""One decode step as the host describes it: a token for each sequence, known to the host or only to the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..core.errors import InternalError
from .batch import Ints

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """How each row's token is drawn, [num_seqs], as in `kernels.logits.rows.SamplingRows`."""

    seeds: Ints
    indices: Ints
    temperature: Floats
    top_k: Ints
    top_p: Floats
    min_p: Floats


@dataclass(frozen=True, slots=True, eq=False)
class DecodeBatch:
    """context_lens [num_seqs]: tokens in the pool once this step's are written. block_table [num_seqs, longest].

    sources [num_seqs]: the row of the step before whose id this row takes, or -1 for the one in token_ids [num_seqs].
    draws: None when every row takes its likeliest token.
    """

    context_lens: Ints
    block_table: Ints
    sources: Ints
    token_ids: Ints
    draws: Draws | None = None

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)

    def check(self, max_seqs: int, max_context: int, pool_shape: torch.Size, vocab_size: int) -> None:
        """The kernels index memory with these numbers: raises InternalError for one out of range."""
        num_blocks, _, _, block_size, _, _ = pool_shape
        if not 0 < self.num_seqs <= max_seqs:
            raise InternalError(f"a step of {self.num_seqs} sequences, it takes 1 to {max_seqs}")
        for name, values, low, stop in (
            ("context", self.context_lens, 1, max_context + 1),
            ("block id", self.block_table, 0, num_blocks),
            ("token id", self.token_ids[self.sources < 0], 0, vocab_size),
        ):
            if values.size and (values.min() < low or values.max() >= stop):
                raise InternalError(f"{name} {values.min()} or {values.max()} is not in [{low}, {stop})")
        if self.context_lens.max() > self.block_table.shape[1] * block_size:
            raise InternalError(
                f"a context of {self.context_lens.max()} tokens in {self.block_table.shape[1]} blocks of {block_size}"
            )

    def check_sources(self, num_rows: int) -> None:
        """The step before had `num_rows` rows."""
        if self.sources.max() >= num_rows:
            raise InternalError(f"a token of row {self.sources.max()}, the step before had {num_rows}")
