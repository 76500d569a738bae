"""The network and its pool: a batch in, logits out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from ..core.errors import InternalError
from ..kernels.decoder_step.op import DecoderStep, StepLogits, likeliest
from ..kernels.kv_write.op import clear_blocks, kv_rows, move_kv
from ..kernels.paged_attention.plan import PoolShape, build_plan
from ..models.config import ModelConfig
from ..models.decoder import Decoder, StepInput, Taps
from ..models.native_step import native_step
from .batch import Batch
from .interface import OnLayers
from .kv_memory import KVMemory


def layer_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one layer of one block: K and V."""
    return 2 * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def pool_view(memory: KVMemory, config: ModelConfig, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """The pool as [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim].

    Keeps the region mapped while it lives.
    """
    shape = (memory.num_blocks, config.num_layers, 2, block_size, config.num_kv_heads, config.head_dim)
    # numpy holds on to the buffer; torch.frombuffer would not, and the region could go from under the tensor.
    return torch.from_numpy(np.frombuffer(memory.buffer, dtype=np.uint8)).view(dtype).view(shape)


class ModelRunner:
    """Turns batches into tensors and runs them. Several runners may share one decoder, each with its own pool."""

    def __init__(self, decoder: Decoder, kv_pool: torch.Tensor) -> None:
        config = decoder.config
        self._decoder, self._pool, self._block_size = decoder, kv_pool, kv_pool.shape[3]
        self._step = native_step(decoder)
        self.num_threads = torch.get_num_threads()
        self._shape = PoolShape(
            config.num_layers, self._block_size, config.num_heads // config.num_kv_heads, decoder.dtype
        )
        self.taps: tuple[int, ...] = ()  # see `Decoder.forward`: what `StepLogits.features` holds
        self._window = config.sliding_window if any(config.window_layers) else None

    @property
    def is_native(self) -> bool:
        """Steps run in the native kernel."""
        return self._step is not None

    def set_num_threads(self, num_threads: int) -> None:
        """Threads of the steps from now on. torch's own team, which would spin beside the native one, stays at one
        thread where steps are native.
        """
        self.num_threads = num_threads
        torch.set_num_threads(1 if self.is_native else num_threads)

    def run(self, batch: Batch, on_layers: OnLayers | None = None) -> torch.Tensor:
        """Logits [sampled rows, vocab_size] in the type that the network computes in.

        Raises InternalError for an id or position out of range.
        """
        return self.step(batch, on_layers).logits

    def step(self, batch: Batch, on_layers: OnLayers | None = None) -> StepLogits:
        """The same with the likeliest tokens."""
        self._check(batch)
        if self._step is not None:
            return self._run_natively(self._step, batch, on_layers)
        taps = Taps(self.taps)
        logits = self._decoder.forward(self._step_input(batch), self._pool, on_layers, taps)
        return replace(likeliest(logits), features=taps.features())

    def move(self, sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> None:
        """Copy keys and values from slots to slots."""
        if len(sources):
            move_kv(self._pool, torch.from_numpy(sources), torch.from_numpy(targets))

    def _run_natively(self, step: DecoderStep, batch: Batch, on_layers: OnLayers | None) -> StepLogits:
        if len(batch.fresh_blocks):
            clear_blocks(self._pool, torch.from_numpy(batch.fresh_blocks))
        return step.run(batch, self._pool, self.num_threads, on_layers, self.taps)

    def _step_input(self, batch: Batch) -> StepInput:
        return StepInput(
            token_ids=torch.from_numpy(batch.token_ids),
            positions=torch.from_numpy(batch.positions),
            kv_rows=kv_rows(torch.from_numpy(batch.slot_mapping), self._pool),
            fresh_blocks=torch.from_numpy(batch.fresh_blocks),
            sampled_rows=torch.from_numpy(batch.sampled_rows),
            plan=build_plan(
                batch.cu_seqlens_q, batch.context_lens, batch.block_table, self._shape, self._window, batch.tree
            ),
        )

    def _check(self, batch: Batch) -> None:
        """The kernels index memory with these numbers."""
        for name, values, bound in (
            ("token id", batch.token_ids, self._decoder.config.vocab_size),
            ("position", batch.positions, self._decoder.max_context),
            ("block id", batch.block_table, self._pool.shape[0]),
        ):
            if values.min() < 0 or values.max() >= bound:
                raise InternalError(f"{name} {values.min()} or {values.max()} is not in [0, {bound})")
