"""Runs the network over a ragged batch: entries in, last logits out."""

from __future__ import annotations

import torch

from ..kernels.paged_attention.plan import build_plan
from ..kernels.paged_attention.pool import KVPool
from ..models.decoder import Decoder
from .batch import Batch, build_batch
from .interface import ScheduledSeq


class ModelRunner:
    """A decoder and the paged cache it works on."""

    def __init__(self, decoder: Decoder, pool: KVPool) -> None:
        self._decoder, self._pool = decoder, pool
        self._group = decoder.config.num_heads // decoder.config.num_kv_heads

    @torch.inference_mode()
    def run(self, entries: list[ScheduledSeq]) -> tuple[Batch, torch.Tensor]:
        """The batch and the logits [len(batch.sample_rows), vocab_size] float32 of its sampling entries."""
        batch = build_batch(entries)
        plan = build_plan(batch.spans, self._pool, self._group, self._decoder.windows, self._decoder.dtype)
        hidden = self._decoder.forward(batch.token_ids, batch.positions, self._pool, plan)
        return batch, self._decoder.logits(hidden.index_select(0, batch.sample_rows))
