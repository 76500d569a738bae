"""How the rows of a decode step are drawn, in device memory that never moves."""

from __future__ import annotations

import numpy as np
import torch

from ..kernels.logits.rows import SamplingRows
from ..kernels.paged_attention.device_plan import upload
from .decode_batch import Draws


class DrawBuffers:
    """The arrays of `kernels.logits` for up to `max_seqs` rows."""

    def __init__(self, max_seqs: int, device: torch.device) -> None:
        self._longs = torch.zeros(2 * max_seqs, dtype=torch.int64, device=device)  # seeds, indices
        self._floats = torch.zeros(3 * max_seqs, device=device)  # temperature, top_p, min_p
        self._top_k = torch.zeros(max_seqs, dtype=torch.int32, device=device)
        self._num_top = torch.full((max_seqs,), -1, dtype=torch.int32, device=device)  # no log-probabilities

    def fill(self, draws: Draws, size: int) -> None:
        """Rows behind those of `draws`, up to `size`, are greedy: they are padding."""
        longs, floats = np.zeros((2, size), dtype=np.int64), np.zeros((3, size), dtype=np.float32)
        top_k = np.zeros(size, dtype=np.int32)
        num_seqs = len(draws.seeds)
        longs[:, :num_seqs] = draws.seeds, draws.indices
        floats[1] = 1.0
        floats[:, :num_seqs] = draws.temperature, draws.top_p, draws.min_p
        top_k[:num_seqs] = draws.top_k
        upload(longs, self._longs[: 2 * size].view(2, size))
        upload(floats, self._floats[: 3 * size].view(3, size))
        upload(top_k, self._top_k[:size])

    def rows(self, size: int, draws: bool) -> SamplingRows | None:
        """The first `size` rows as the kernel takes them; None where nothing is drawn."""
        if not draws:
            return None
        seeds, indices = self._longs[: 2 * size].view(2, size)
        temperature, top_p, min_p = self._floats[: 3 * size].view(3, size)
        return SamplingRows(seeds, indices, temperature, self._top_k[:size], top_p, min_p, num_top=self._num_top[:size])
