"""The network of `decoder`, composed of fused operations for any device: on CUDA their Triton kernels run.

    token ids → embedding = residual → norm
        [ q,k,v → norm of heads → rotate, store KV → paged attention → o → add to the residual, norm
                                          gate,up → silu · → down → add to the residual, norm ] × num_layers
              → head, for sampled rows alone

A step launches what its shapes say and asks the device for nothing, so it can be captured in a CUDA graph. `Decoder`
is its twin; where there is no device the operations' references run, slowly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..kernels.paged_attention.device_plan import DevicePlan
from ..kernels.paged_attention.op import EIGHT_BITS, paged_attention
from ..kernels.rms_norm.op import add_rms_norm, qk_norm, rms_norm
from ..kernels.rope_kv_write.layout import CacheLayer, Rotation
from ..kernels.rope_kv_write.op import rope_kv_write
from ..kernels.silu_mul.op import silu_mul
from .config import ModelConfig
from .decoder import DecoderWeights, LayerWeights
from .rope import rope_angles, rope_frequencies


@dataclass(frozen=True, slots=True, eq=False)
class DevicePool:
    """Keys and values on a device.

    numbers [num_blocks, num_layers, 2 (K, V), block_size, num_kv_heads, head_dim], in the type that the network
    computes in, or int8 or float8_e4m3fn. scales [num_blocks, num_layers, 2, num_kv_heads] float32 with 8 bits only.
    """

    numbers: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def num_blocks(self) -> int:
        return self.numbers.shape[0]

    @property
    def block_size(self) -> int:
        return self.numbers.shape[3]


def make_pool(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> DevicePool:
    """A pool of zeros."""
    shape = (num_blocks, config.num_layers, 2, block_size, config.num_kv_heads, config.head_dim)
    scales = torch.zeros(*shape[:3], shape[4], device=device) if dtype in EIGHT_BITS else None
    return DevicePool(torch.zeros(shape, dtype=dtype, device=device), scales)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceStep:
    """A ragged batch on the device; index tensors are int64, [num_tokens].

    slot_mapping: where each token's key and value go; -1 for a token that is padding. sampled_rows: rows whose logits
    are wanted, None for all.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    plan: DevicePlan
    sampled_rows: torch.Tensor | None = None


class DeviceDecoder:
    """The network with its weights, on the device where these lie; without a pool.

    max_context: the longest sequence, in tokens. Ids, positions and slots are not looked at: they are the caller's to
    bound. Blocks are not cleared either: no operation here reads a slot behind a sequence's last token.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, max_context: int) -> None:
        self.config, self.weights, self.max_context = config, weights, max_context
        self.dtype, self.device = weights.embedding.dtype, weights.norm.device
        self.scale = 1 / math.sqrt(config.head_dim)
        angles = rope_angles(torch.arange(max_context), *rope_frequencies(config, max_context))
        self._cos, self._sin = (table.contiguous().to(self.device) for table in angles)

    @torch.inference_mode()
    def forward(self, step: DeviceStep, pool: DevicePool) -> torch.Tensor:
        """Run the step, storing its keys and values in `pool`; logits [sampled rows, vocab_size].

        Raises InternalError where shapes or types do not fit.
        """
        eps, layers = self.config.rms_norm_eps, self.weights.layers
        rotation = Rotation(self._cos, self._sin, step.positions)
        residual = self.weights.embedding.index_select(0, step.token_ids)
        normed = rms_norm(residual, layers[0].attention_norm, eps)
        for index, layer in enumerate(layers):
            added = layer.output(self._attend(index, layer, normed, rotation, step, pool))
            if index + 1 == len(layers) and step.sampled_rows is not None:  # what follows looks at no other row
                added, residual = added[step.sampled_rows], residual[step.sampled_rows]
            normed = add_rms_norm(added, residual, layer.mlp_norm, eps)
            added = layer.down(silu_mul(layer.gate_up(normed)))
            following = layers[index + 1].attention_norm if index + 1 < len(layers) else self.weights.norm
            normed = add_rms_norm(added, residual, following, eps)
        return self.weights.head(normed)

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        normed: torch.Tensor,
        rotation: Rotation,
        step: DeviceStep,
        pool: DevicePool,
    ) -> torch.Tensor:
        """Attention before its output projection, [num_tokens, num_heads · head_dim]. Stores keys and values."""
        config = self.config
        num_heads, head_dim = config.num_heads, config.head_dim
        qkv = layer.qkv(normed)
        heads = qkv.view(len(qkv), -1, head_dim)
        if layer.qk_norm is not None:
            q_weight, k_weight = layer.qk_norm[0], layer.qk_norm[num_heads]
            qk = heads[:, : num_heads + config.num_kv_heads]
            qk_norm(qk, q_weight, k_weight, num_heads, config.rms_norm_eps)
        cache = CacheLayer(pool.numbers, index, pool.scales)
        rope_kv_write(qkv, num_heads, rotation if config.rope_layers[index] else None, cache, step.slot_mapping)
        attended = paged_attention(
            heads[:, :num_heads],
            pool.numbers,
            index,
            step.plan,
            scale=self.scale,
            window=config.sliding_window if config.window_layers[index] else None,
            kv_scales=pool.scales,
        )
        return attended.reshape(len(qkv), num_heads * head_dim)
