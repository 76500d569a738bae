"""Decode steps whose launch costs one call: a CUDA graph for each padded batch size, sampled ids left on the device.

    host      fill n+1 ──► launch n+1 ──► read the ids of n ──► fill n+2 …
    device    … step n ────────────────► step n+1 ───────────► …

1. `launch` writes a step's arrays into buffers that never move (one copy each, ordered behind the step before), runs
   the step and begins to copy its ids to pinned memory. It waits for nothing.
2. A row's token is the one that a row of the step before drew, which is on the device already, or one the host knows.
3. `Ids.wait` gives the ids; called after the next `launch`, it finds them there.

A batch is padded to the next of `padded_size`: rows of context 0 and slot -1, which nothing is stored for. The first
step of a size runs uncaptured, which compiles and tunes its kernels on real contexts; then it is captured, and later
ones replay it. A graph keeps the number of parts that attention cuts a context into, so replays give the same bits.
Without CUDA every step runs uncaptured, through the same buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..core.errors import InternalError
from ..kernels.logits.op import draw_tokens
from ..kernels.paged_attention.device_plan import DevicePlan, PlanBuffers, choose_splits, num_processors, upload
from ..models.device_decoder import DeviceDecoder, DevicePool, DeviceStep
from .batch import Ints
from .decode_batch import DecodeBatch
from .draw_buffers import DrawBuffers
from .sequence import blocks_for

_MULTIPLE = 8  # sizes above are multiples of it: a row more costs a decode step next to nothing, a graph costs memory


def padded_size(num_seqs: int, max_seqs: int) -> int:
    """1, 2, 4, 8, then multiples of 8, none above `max_seqs`."""
    if num_seqs <= _MULTIPLE:
        return min(1 << (num_seqs - 1).bit_length(), max_seqs)
    return min(-(-num_seqs // _MULTIPLE) * _MULTIPLE, max_seqs)


@dataclass(frozen=True, slots=True, eq=False)
class Ids:
    """What a step drew, on its way to the host."""

    step: GraphStep
    number: int
    num_seqs: int

    def wait(self) -> Ints:
        """Token ids [num_seqs]; -1 where a row's logits held no finite maximum.

        Raises InternalError when two steps were launched since: their ids have taken the place of these.
        """
        return self.step.read(self.number, self.num_seqs)


class GraphStep:
    """Steps of up to `max_seqs` sequences of up to `max_context` tokens. Not for several threads.

    num_splits: parts that a context is cut into, for all sizes; None chooses for each size what its longest contexts
    keep the device busy with. captures: whether steps are captured and replayed; by default where there is CUDA.
    """

    def __init__(
        self,
        decoder: DeviceDecoder,
        pool: DevicePool,
        max_seqs: int,
        max_context: int | None = None,
        num_splits: int | None = None,
    ) -> None:
        self.max_seqs, self.max_context = max_seqs, max_context or decoder.max_context
        if self.max_context > decoder.max_context or max_seqs < 1:
            raise InternalError(f"{max_seqs} sequences of {self.max_context} tokens, the network takes fewer")
        self._decoder, self._pool, self._num_splits = decoder, pool, num_splits
        self._device, self._is_cuda = decoder.device, decoder.device.type == "cuda"
        self._plans = PlanBuffers(max_seqs, blocks_for(self.max_context, pool.block_size), self._device)
        self._rows = torch.zeros(3 * max_seqs, dtype=torch.int64, device=self._device)
        # Ids drawn by the step before, then ids from the host: a row's source is an index into both.
        self._known = torch.zeros(2, max_seqs, dtype=torch.int64, device=self._device)
        self._draws = DrawBuffers(max_seqs, self._device)
        self._host = torch.zeros(2, max_seqs, dtype=torch.int64, pin_memory=self._is_cuda)
        self._arrived = [torch.Event(device=self._device) for _ in range(2)] if self._is_cuda else []
        self._num_launched = self._last_size = 0
        self.captures = self._is_cuda
        self._replays: dict[tuple[int, bool], Callable[[], None]] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if self._is_cuda else None

    @property
    def num_graphs(self) -> int:
        return len(self._replays)

    def launch(self, batch: DecodeBatch) -> Ids:
        """Begin a step. Raises InternalError for a batch that does not fit, before anything is changed."""
        batch.check(self.max_seqs, self.max_context, self._pool.numbers.shape, self._decoder.config.vocab_size)
        batch.check_sources(self._last_size)
        size = padded_size(batch.num_seqs, self.max_seqs)
        plan = self._fill(batch, size)
        self._run(size, batch.draws is not None, plan)
        self._last_size = batch.num_seqs
        return self._send(batch.num_seqs)

    def read(self, number: int, num_seqs: int) -> Ints:
        """As `Ids.wait`, for step `number`."""
        if self._num_launched - number > len(self._host):
            raise InternalError(f"ids of step {number} are read after step {self._num_launched - 1} was launched")
        if self._is_cuda:
            self._arrived[number % 2].synchronize()
        return self._host[number % 2, :num_seqs].numpy().copy()

    def _fill(self, batch: DecodeBatch, size: int) -> DevicePlan:
        num_seqs, padding = batch.num_seqs, size - batch.num_seqs
        positions = batch.context_lens - 1
        blocks = batch.block_table[np.arange(num_seqs), positions // self._pool.block_size]
        slots = blocks * self._pool.block_size + positions % self._pool.block_size
        is_known = batch.sources < 0
        sources = np.where(is_known, self.max_seqs + np.arange(num_seqs), batch.sources)
        rows = np.zeros((3, size), dtype=np.int64)
        rows[1] = -1
        rows[:, :num_seqs] = positions, slots, sources
        upload(rows, self._rows_of(size))
        if is_known.any():
            upload(np.maximum(batch.token_ids, 0), self._known[1, :num_seqs])
        if batch.draws is not None:
            self._draws.fill(batch.draws, size)
        num_splits = self._num_splits or choose_splits(
            size, self._decoder.config.num_kv_heads, self.max_context, num_processors(self._device)
        )
        width = blocks_for(int(batch.context_lens.max()), self._pool.block_size)
        table = np.pad(batch.block_table[:, :width], ((0, padding), (0, 0)))
        return self._plans.fill(np.arange(size + 1), np.pad(batch.context_lens, (0, padding)), table, num_splits)

    def _rows_of(self, size: int) -> torch.Tensor:
        """Positions, slots and sources, [3, size]; dense, so that one copy fills them."""
        return self._rows[: 3 * size].view(3, size)

    def _run(self, size: int, draws: bool, plan: DevicePlan) -> None:
        replay = self._replays.get((size, draws))
        if replay is not None:
            replay()
            return
        self._compute(size, draws, plan)
        if self.captures:
            self._replays[size, draws] = self._capture(size, draws, self._plans.widest(plan, self.max_context))

    def _capture(self, size: int, draws: bool, plan: DevicePlan) -> Callable[[], None]:
        """A step of this kind as one call; `plan` holds for all of them. Runs nothing now."""
        graph = torch.cuda.CUDAGraph()
        # One memory for all graphs: they run one after the other, and what outlives a step is in our buffers.
        with torch.cuda.graph(graph, pool=self._graph_memory):
            self._compute(size, draws, plan)
        replay: Callable[[], None] = graph.replay
        return replay

    @torch.inference_mode()
    def _compute(self, size: int, draws: bool, plan: DevicePlan) -> None:
        positions, slots, sources = self._rows_of(size).unbind()
        # An id of -1 is an error that the host has yet to hear of; until then any token will do.
        token_ids = self._known.view(-1).index_select(0, sources).clamp_(min=0)
        step = DeviceStep(token_ids, positions, slots, plan)
        logits = self._decoder.forward(step, self._pool)
        rows = self._draws.rows(size, draws)
        drawn = _likeliest(logits) if rows is None else draw_tokens(logits, rows).token_ids
        self._known[0, :size].copy_(drawn)

    def _send(self, num_seqs: int) -> Ids:
        number = self._num_launched
        self._host[number % 2, :num_seqs].copy_(self._known[0, :num_seqs], non_blocking=True)
        if self._is_cuda:
            self._arrived[number % 2].record()
        self._num_launched += 1
        return Ids(self, number, num_seqs)


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The highest of each row; -1 where that is not finite."""
    highest, token_ids = logits.max(dim=-1)
    return token_ids.masked_fill_(~highest.isfinite(), -1)
