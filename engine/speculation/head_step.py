"""One step of a draft head for many sequences: rows in, their keys and values stored, a guess behind each last row.

TorchHeadStep    sequence by sequence, as `models.draft_chain` does it; anywhere
NativeHeadStep   the decoder step's kernel, with weights of 8 bits (4 at the end) and all sequences in one call
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ...kernels.decoder_step.op import DecoderStep, Given, StepEntrance, StepLayer, StepNetwork, can_run
from ...kernels.quant_linear.grouped import GROUP, group, group_in_4_bits
from ...kernels.quant_linear.op import QuantEmbedding, QuantLinear, is_native
from ...models.draft_config import EAGLE3
from ...models.draft_head import DraftHead
from ..batch import Batch, Ints

NumThreads = Callable[[], int]

_LAYER_OUTPUT = (1,)  # as a tap
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class HeadRows:
    """Rows of sequences side by side: those of sequence i are [cu_seqlens[i], cu_seqlens[i + 1]), one at least.

    hidden [rows, hidden_size] float32, and for each row the token that follows it and its position. slots, num_kept
    [sequences]: where a sequence's keys and values lie, and how many rows are there before these.
    """

    hidden: torch.Tensor
    token_ids: Ints
    positions: Ints
    cu_seqlens: Ints
    slots: Ints
    num_kept: Ints


@dataclass(frozen=True, slots=True, eq=False)
class HeadGuesses:
    """Of each sequence's last row: the layer's output [sequences, hidden_size], logits [sequences, draft_vocab_size]
    and the likeliest entry of these [sequences].
    """

    hidden: torch.Tensor
    logits: npt.NDArray[np.float32]
    best: Ints


class HeadStep(Protocol):
    """pool: see `HeadCache.pool`. Positions must be below the limit that the step was made for."""

    def __call__(self, rows: HeadRows, pool: torch.Tensor) -> HeadGuesses: ...


def make_head_step(head: DraftHead, max_positions: int, num_threads: NumThreads) -> HeadStep:
    """The quickest there is. `num_threads`: of each step."""
    matrices = [weight for weight in head.weights.values() if weight.dim() == 2]
    if not is_native() or any(matrix.shape[1] % GROUP for matrix in matrices):
        return TorchHeadStep(head)
    network = _network(head, max_positions)
    return NativeHeadStep(head, network, num_threads) if can_run(network) else TorchHeadStep(head)


class TorchHeadStep:
    """The slow, obvious one."""

    def __init__(self, head: DraftHead) -> None:
        self._head = head

    @torch.inference_mode()
    def __call__(self, rows: HeadRows, pool: torch.Tensor) -> HeadGuesses:
        head = self._head
        hidden = rows.hidden.to(head.lm_head.dtype)
        row = head.enter(hidden, torch.from_numpy(rows.token_ids), torch.from_numpy(rows.positions))
        last: list[torch.Tensor] = []
        for index, (slot, begin) in enumerate(zip(rows.slots.tolist(), rows.num_kept.tolist(), strict=True)):
            start, stop = rows.cu_seqlens[index : index + 2].tolist()
            end = begin + stop - start
            keys, values = pool[slot, 0]
            keys[begin:end], values[begin:end] = row.k[start:stop].to(pool.dtype), row.v[start:stop].to(pool.dtype)
            is_seen = torch.arange(end) <= torch.arange(begin, end).unsqueeze(1)
            parts = (row.q[start:stop], keys[:end].to(hidden.dtype), values[:end].to(hidden.dtype))
            q, k, v = (part.transpose(0, 1) for part in parts)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen, scale=head.scale, enable_gqa=True)
            last.append(head.leave(row.residual[stop - 1], attended[:, -1]))
        hidden = torch.stack(last)
        logits = head.logits(hidden).float().numpy()
        return HeadGuesses(hidden.float(), logits, logits.argmax(axis=-1))


class NativeHeadStep:
    """Implements the same with the native kernel."""

    def __init__(self, head: DraftHead, network: StepNetwork, num_threads: NumThreads) -> None:
        self._embedding = head.embedding if network.embedding is None else None
        self._step, self._num_threads = DecoderStep(network), num_threads

    def __call__(self, rows: HeadRows, pool: torch.Tensor) -> HeadGuesses:
        given = Given(rows.hidden, self._embedded(rows.token_ids))
        batch = _batch(rows, pool.shape[3])
        result = self._step.run(batch, pool, self._num_threads(), taps=_LAYER_OUTPUT, given=given)
        assert result.features is not None
        return HeadGuesses(result.features[:, 0], result.logits.numpy(), result.best)

    def _embedded(self, token_ids: Ints) -> torch.Tensor | None:
        if self._embedding is None:
            return None
        return self._embedding.index_select(0, torch.from_numpy(token_ids)).float()


def _batch(rows: HeadRows, capacity: int) -> Batch:
    """For the kernel, with a slot for a block."""
    starts = rows.cu_seqlens
    lengths = np.diff(starts)
    first = rows.slots * capacity + rows.num_kept - starts[:-1]
    return Batch(
        token_ids=rows.token_ids,
        positions=rows.positions,
        slot_mapping=np.repeat(first, lengths) + np.arange(starts[-1]),
        cu_seqlens_q=starts,
        context_lens=rows.num_kept + lengths,
        block_table=rows.slots[:, None].copy(),
        sampled_rows=starts[1:] - 1,
        fresh_blocks=_NONE,
    )


def _network(head: DraftHead, max_positions: int) -> StepNetwork:
    config = head.config
    layer = config.layer
    cosines, sines = head.angles(torch.arange(max_positions))
    return StepNetwork(
        hidden=layer.hidden_size,
        inner=layer.intermediate_size,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        epsilon=layer.rms_norm_eps,
        scale=head.scale,
        cosines=cosines.contiguous(),
        sines=sines.contiguous(),
        layers=[_layer(head)],
        norm=_float(head, "norm.weight"),
        embedding=head.embedding.linear if isinstance(head.embedding, QuantEmbedding) else None,
        head=QuantLinear(group_in_4_bits(head.lm_head.float())),  # most of what a guess reads
        entrance=_entrance(head),
    )


def _entrance(head: DraftHead) -> StepEntrance:
    config = head.config
    if config.layout == EAGLE3:
        names, fc = (config.name("input_layernorm.weight"), config.name("hidden_norm.weight")), None
    else:
        names = ("embedding_layernorm.weight", "hidden_states_layernorm.weight")
        fc = QuantLinear(group(head.weights["fc.weight"].float()), _float(head, "fc.bias"))
    embedding_norm, hidden_norm = (_float(head, name) for name in names)
    return StepEntrance(embedding_norm, hidden_norm, fc, config.norm_before_residual)


def _layer(head: DraftHead) -> StepLayer:
    def matrix(*parts: str) -> QuantLinear:
        weights = [head.weights[head.config.name(f"{part}.weight")].float() for part in parts]
        return QuantLinear(group(torch.cat(weights)))

    is_eagle3 = head.config.layout == EAGLE3
    norm = _float(head, head.config.name("post_attention_layernorm.weight"))
    assert norm is not None
    return StepLayer(
        attention_norm=None if is_eagle3 else _float(head, head.config.name("input_layernorm.weight")),
        mlp_norm=norm,
        qk_norm=None,
        qkv=matrix("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=matrix("self_attn.o_proj"),
        gate_up=matrix("mlp.gate_proj", "mlp.up_proj"),
        down=matrix("mlp.down_proj"),
        window=None,
        rotates=True,
    )


def _float(head: DraftHead, name: str) -> torch.Tensor | None:
    weight = head.weights.get(name)
    return None if weight is None else weight.float().contiguous()
