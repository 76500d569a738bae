"""The native step of a network, where there is one."""

from __future__ import annotations

import torch

from ..kernels.decoder_step.op import DecoderStep, StepLayer, StepNetwork, can_run
from ..kernels.quant_linear.op import QuantEmbedding, QuantLinear
from .config import ModelConfig
from .decoder import Decoder, LayerWeights


def native_step(decoder: Decoder) -> DecoderStep | None:
    """None when the network's weights are not grouped, or the kernel is not here or not made for its sizes."""
    network = _network(decoder)
    return DecoderStep(network) if network is not None and can_run(network) else None


def _network(decoder: Decoder) -> StepNetwork | None:
    config, weights = decoder.config, decoder.weights
    found = (_layer(config, index, layer) for index, layer in enumerate(weights.layers))
    layers = [layer for layer in found if layer is not None]
    embedding, head = weights.embedding, weights.head
    if not isinstance(embedding, QuantEmbedding) or not isinstance(head, QuantLinear):
        return None
    cosines, sines = decoder.angles(torch.arange(decoder.max_context))
    return StepNetwork(
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        epsilon=config.rms_norm_eps,
        scale=decoder.scale,
        cosines=cosines.contiguous(),
        sines=sines.contiguous(),
        layers=layers,
        norm=weights.norm.contiguous(),
        embedding=embedding.linear,
        head=head,
    )


def _layer(config: ModelConfig, index: int, layer: LayerWeights) -> StepLayer | None:
    match layer.qkv, layer.output, layer.gate_up, layer.down:
        case QuantLinear() as qkv, QuantLinear() as output, QuantLinear() as gate_up, QuantLinear() as down:
            return StepLayer(
                attention_norm=layer.attention_norm.contiguous(),
                mlp_norm=layer.mlp_norm.contiguous(),
                qk_norm=None if layer.qk_norm is None else layer.qk_norm.contiguous(),
                qkv=qkv,
                output=output,
                gate_up=gate_up,
                down=down,
                window=config.sliding_window if config.window_layers[index] else None,
                rotates=config.rope_layers[index],
            )
        case _:
            return None
