"""The decoder network of all our architectures: what differs between them is in `ModelConfig`, not in code.

    token ids → embedding → [ norm → q,k,v → rotate → store KV → paged attention → o + residual
                              norm → gate,up → silu · → down + residual ] × num_layers
              → norm → head, for sampled rows alone

Projections that share an input are one product (q,k,v and gate,up), additions of the residual happen inside the
product, and what depends only on positions is worked out once for a step. Sums, norms and softmax run in float32
whatever the type of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F

from ..kernels.kv_write.op import clear_blocks, store_kv
from ..kernels.paged_attention.op import paged_attention
from ..kernels.paged_attention.plan import AttentionPlan
from .config import ModelConfig
from .draft_config import FINAL_NORM
from .rope import rope_angles, rope_frequencies

# Cosines and sines of each token's angles, [num_tokens, 1, head_dim]; the sines of the first half are negated.
Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class StepInput:
    """A ragged batch as the network sees it; all index tensors are int64.

    kv_rows: where the new keys and values go (`kernels.kv_write`). fresh_blocks: blocks to be zeroed first.
    sampled_rows: rows whose logits are wanted.
    """

    token_ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens]
    kv_rows: torch.Tensor  # [2 · num_tokens]
    fresh_blocks: torch.Tensor
    sampled_rows: torch.Tensor
    plan: AttentionPlan


class Projection(Protocol):
    """`kernels.linear.op.Linear`, or one with grouped weights."""

    num_weights: int
    num_bytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] → [rows, out]."""
        ...

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same plus residual [rows, out]."""
        ...


class Embedding(Protocol):
    """A tensor [vocab_size, hidden_size], or what gives its rows. `dtype`: what the network computes in."""

    @property
    def dtype(self) -> torch.dtype: ...

    def index_select(self, dim: int, index: torch.Tensor, /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer.

    qk_norm: [num_heads + num_kv_heads, head_dim], the queries' weight and the keys' for each of their heads.
    """

    attention_norm: torch.Tensor
    qkv: Projection
    output: Projection
    mlp_norm: torch.Tensor
    gate_up: Projection
    down: Projection
    qk_norm: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    embedding: Embedding
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Projection


@dataclass(slots=True, eq=False)
class Taps:
    """Hidden states of the sampled rows: after each of so many `layers` (0: the embedding), or FINAL_NORM."""

    layers: tuple[int, ...]
    _found: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, layer: int, x: torch.Tensor, rows: torch.Tensor | None) -> None:
        """x: the hidden states after `layer`, of all tokens or, without `rows`, of the sampled ones."""
        if layer in self.layers:
            self._found[layer] = (x if rows is None else x[rows]).to("cpu", torch.float32)

    def features(self) -> torch.Tensor | None:
        """[sampled rows, taps, hidden_size] float32; None where nothing was asked for or sampled."""
        return torch.stack([self._found[layer] for layer in self.layers], dim=1) if self._found else None


class Decoder:
    """The network with its weights, without a cache: engines that share it bring their own pools.

    max_context: the longest sequence, in tokens. Some kinds of rotary scaling depend on it, and with it the keys in
    the cache. `dtype`: what it computes in; `cache_dtype`: what keys and values are stored in.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        max_context: int,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.config, self.weights, self.max_context = config, weights, max_context
        self.dtype = weights.embedding.dtype
        self.cache_dtype = cache_dtype or self.dtype
        self.scale = 1 / math.sqrt(config.head_dim)
        self._inv_freq, self._gain = rope_frequencies(config, max_context)

    @property
    def linear_weights(self) -> int:
        """How many weights the products of one token have, the head's included."""
        return sum(product.num_weights for product in self._products())

    @property
    def weight_bytes(self) -> int:
        """Bytes of these weights, which a step of few tokens reads once."""
        return sum(product.num_bytes for product in self._products())

    def _products(self) -> Iterator[Projection]:
        for layer in self.weights.layers:
            yield from (layer.qkv, layer.output, layer.gate_up, layer.down)
        yield self.weights.head

    @torch.inference_mode()
    def forward(
        self,
        step: StepInput,
        kv_pool: torch.Tensor,
        on_layers: Callable[[int], None] | None = None,
        taps: Taps | None = None,
    ) -> torch.Tensor:
        """Run the step, storing its keys and values in `kv_pool`; logits [sampled rows, vocab_size].

        `on_layers(n)` hears when those of the first n layers are stored. `taps` takes hidden states of sampled rows.
        """
        if len(step.fresh_blocks):
            clear_blocks(kv_pool, step.fresh_blocks)
        rotation = self._rotation(step.positions)
        x = self.weights.embedding.index_select(0, step.token_ids)
        taps = taps or Taps(())
        taps.take(0, x, step.sampled_rows)
        last = self.config.num_layers - 1
        for index, layer in enumerate(self.weights.layers):
            attended = self._attend(index, layer, x, rotation, step, kv_pool)
            if on_layers is not None:
                on_layers(index + 1)
            if index == last:  # what follows looks at no other row
                attended, x = attended[step.sampled_rows], x[step.sampled_rows]
                if not len(x):
                    return x.new_empty(0, self.config.vocab_size)
            x = self._feed_forward(layer, layer.output.plus(attended, x))
            taps.take(index + 1, x, None if index == last else step.sampled_rows)
        normed = self._norm(x, self.weights.norm)
        taps.take(FINAL_NORM, normed, None)
        return self.weights.head(normed)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for tokens at `positions`, [tokens, head_dim / 2] float32."""
        return rope_angles(positions, self._inv_freq, self._gain)

    def _rotation(self, positions: torch.Tensor) -> Rotation:
        cos, sin = (part.unsqueeze(1) for part in self.angles(positions))
        return torch.cat((cos, cos), dim=-1).to(self.dtype), torch.cat((-sin, sin), dim=-1).to(self.dtype)

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        rotation: Rotation,
        step: StepInput,
        kv_pool: torch.Tensor,
    ) -> torch.Tensor:
        """Attention before its output projection, [num_tokens, num_heads · head_dim]. Stores keys and values."""
        config = self.config
        num_tokens, num_kv_heads, head_dim = x.shape[0], config.num_kv_heads, config.head_dim
        query_width = config.num_heads * head_dim
        qkv = layer.qkv(self._norm(x, layer.attention_norm))
        qk = qkv[:, : query_width + num_kv_heads * head_dim].view(num_tokens, -1, head_dim)
        if layer.qk_norm is not None:
            qk.copy_(self._norm(qk, None).mul_(layer.qk_norm))
        if config.rope_layers[index]:
            rotate(qk, rotation)
        kv = qkv[:, query_width:].reshape(num_tokens, 2, -1)
        store_kv(kv.to(kv_pool.dtype), kv_pool, index, step.kv_rows)
        window = config.sliding_window if config.window_layers[index] else None
        q = qk[:, : config.num_heads]
        return paged_attention(q, kv_pool, index, step.plan, scale=self.scale, window=window).view(
            num_tokens, query_width
        )

    def _feed_forward(self, layer: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        gate_up = layer.gate_up(self._norm(x, layer.mlp_norm))
        gate, up = gate_up.chunk(2, dim=-1)
        return layer.down.plus(F.silu(gate).mul_(up), x)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.config.rms_norm_eps)


def rotate(x: torch.Tensor, rotation: Rotation) -> None:
    """Rotary embedding in place: x [num_tokens, heads, head_dim].

    Dimension i turns with dimension i + head_dim/2, so the partner of each is x rolled by half.
    """
    cos, sin = rotation
    partner = x.roll(x.shape[-1] // 2, dims=-1)
    torch.addcmul(x * cos, partner, sin, out=x)
