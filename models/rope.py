"""Rotary frequencies for each scaling kind, in the arithmetic of transformers so that logits agree.

Sources: RoFormer (rotary embedding), position interpolation (linear), NTK-aware scaling (dynamic), YaRN, LongRoPE, and
the Llama 3.1 release (llama3).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig, max_context: int | None = None) -> tuple[torch.Tensor, float]:
    """inv_freq [head_dim/2] float32, and the factor that multiplies both cos and sin.

    `max_context` matters to "longrope" and "dynamic" only: the longest context that will be served. One table holds for
    a whole sequence, because cached keys are already rotated. None means no longer than pre-training.
    """
    scaling = config.rope_scaling
    return _KINDS[scaling.kind](config, scaling, max_context)


def rope_angles(positions: torch.Tensor, inv_freq: torch.Tensor, gain: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for tokens at `positions`, [tokens, head_dim / 2] float32."""
    angles = torch.outer(positions.float(), inv_freq)
    return angles.cos().mul_(gain), angles.sin().mul_(gain)


def _plain(base: float, dim: int) -> torch.Tensor:
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _none(config: ModelConfig, scaling: RopeScaling, max_context: int | None) -> tuple[torch.Tensor, float]:
    return _plain(config.rope_theta, config.head_dim), 1.0


def _linear(config: ModelConfig, scaling: RopeScaling, max_context: int | None) -> tuple[torch.Tensor, float]:
    return _plain(config.rope_theta, config.head_dim) / scaling.factor, 1.0


def _dynamic(config: ModelConfig, scaling: RopeScaling, max_context: int | None) -> tuple[torch.Tensor, float]:
    """The base grows with the context beyond `max_position`; within it nothing changes."""
    dim = config.head_dim
    reach = max(max_context or 0, config.max_position)
    stretch = scaling.factor * reach / config.max_position - (scaling.factor - 1)
    return _plain(config.rope_theta * stretch ** (dim / (dim - 2)), dim), 1.0


def _llama3(config: ModelConfig, scaling: RopeScaling, max_context: int | None) -> tuple[torch.Tensor, float]:
    """Long waves are stretched, short ones kept, those between blended."""
    plain = _plain(config.rope_theta, config.head_dim)
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position
    wavelength = 2 * math.pi / plain
    keep = (original / wavelength - low) / (high - low)  # share of the unstretched frequency
    blended = (1 - keep) * plain / scaling.factor + keep * plain
    stretched = torch.where(wavelength > original / low, plain / scaling.factor, blended)
    return torch.where(wavelength < original / high, plain, stretched), 1.0


def _yarn(config: ModelConfig, scaling: RopeScaling, max_context: int | None) -> tuple[torch.Tensor, float]:
    """A ramp over dimensions from the plain frequencies (fast waves) to the stretched ones (slow waves)."""
    dim = config.head_dim
    periods = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    low, high = _yarn_ramp_ends(config, scaling)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    plain_share = 1 - ramp
    inv_freq = 1.0 / (scaling.factor * periods) * (1 - plain_share) + 1.0 / periods * plain_share
    return inv_freq, _yarn_attention_factor(scaling)


def _yarn_ramp_ends(config: ModelConfig, scaling: RopeScaling) -> tuple[float, float]:
    """The dimensions whose waves turn beta_fast and beta_slow times over the pre-training length."""

    def dimension(turns: float) -> float:
        ratio = scaling.original_max_position / (turns * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    return low, high + 0.001 if low == high else high


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _attention_gain(scaling.factor, scaling.mscale) / _attention_gain(scaling.factor, scaling.mscale_all_dim)
    return _attention_gain(scaling.factor, 1.0)


def _attention_gain(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(config: ModelConfig, scaling: RopeScaling, max_context: int | None) -> tuple[torch.Tensor, float]:
    """One divisor per dimension, a second set for contexts beyond the pre-training length."""
    is_long = (max_context or 0) > scaling.original_max_position
    divisors = torch.tensor(scaling.long_factor if is_long else scaling.short_factor, dtype=torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    gain = scaling.attention_factor
    if gain is None:
        stretch = max(scaling.factor, 1.0)
        gain = math.sqrt(1 + math.log(stretch) / math.log(scaling.original_max_position))
    return 1.0 / (divisors * config.rope_theta**exponents), gain


_KINDS: dict[str, Callable[[ModelConfig, RopeScaling, int | None], tuple[torch.Tensor, float]]] = {
    "none": _none,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
