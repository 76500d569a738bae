"""What a draft head reads and learns from: the target's hidden states over finished samples, kept in files.

The network runs over whole sequences without a cache, sequences packed side by side; only attention looks at them one
by one. Each shard of samples becomes one .safetensors file, so a run that was cut goes on behind what is there, and
epochs read the files through memory maps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.errors import ConfigError
from ..models.decoder import Decoder, LayerWeights, Rotation, rotate
from ..models.draft_config import FINAL_NORM
from .generation import Sample

Progress = Callable[[int, int], None]  # (samples done, samples in all)

SHARD_TOKENS = 8192


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sample as the head sees it. Row t of `features` [num_tokens, feature_size] belongs to token t, as does row t
    of `final` [num_tokens, hidden_size]: the target's head gives the distribution of token t + 1 from it.
    """

    sample: Sample
    features: torch.Tensor
    final: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.sample.token_ids)


def compute_features(
    decoder: Decoder, samples: Sequence[Sample], target_layers: Sequence[int], folder: Path, progress: Progress
) -> list[Path]:
    """Files with the hidden states of all samples behind these layers and the final norm, in order. Those that are in
    `folder` already are kept; they may have more layers.

    Raises ConfigError where one of them is of other samples, or lacks a layer.
    """
    layers = sorted({*target_layers, FINAL_NORM})
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    done = 0
    for number, shard in enumerate(shards(samples)):
        path = shard_path(folder, number)
        if path.exists():
            _check_shard(path, shard, layers)
        else:
            write_shard(decoder, shard, layers, path)
        paths.append(path)
        done += len(shard)
        progress(done, len(samples))
    return paths


def read_examples(path: Path, samples: Sequence[Sample], target_layers: Sequence[int]) -> Iterator[Example]:
    """The examples in a file of `compute_features`; `samples` are all of the run's, by number."""
    with safe_open(path, framework="pt") as reader:
        states, facts = reader.get_tensor("states"), reader.metadata()
    layers, numbers = json.loads(facts["layers"]), json.loads(facts["samples"])
    final = states[:, layers.index(FINAL_NORM)]
    features = torch.cat([states[:, layers.index(layer)] for layer in target_layers], dim=1)
    start = 0
    for number in numbers:
        stop = start + len(samples[number].token_ids)
        yield Example(samples[number], features[start:stop], final[start:stop])
        start = stop


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"features-{number:05d}.safetensors"


def shards(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """The samples of each file."""
    shard: list[Sample] = []
    for sample in samples:
        shard.append(sample)
        if sum(len(s.token_ids) for s in shard) >= SHARD_TOKENS:
            yield shard
            shard = []
    if shard:
        yield shard


def write_shard(decoder: Decoder, shard: list[Sample], layers: Sequence[int], path: Path) -> None:
    """One file: the hidden states [num_tokens, len(layers), hidden_size] of its samples, in bfloat16."""
    states = hidden_states(decoder, [sample.token_ids for sample in shard], layers)
    partial = path.with_suffix(".partial")
    facts = _shard_facts(shard) | {"layers": json.dumps(list(layers))}
    save_file({"states": states.to("cpu", torch.bfloat16).contiguous()}, partial, facts)
    partial.rename(path)


def _shard_facts(shard: list[Sample]) -> dict[str, str]:
    return {
        "samples": json.dumps([sample.number for sample in shard]),
        "lengths": json.dumps([len(sample.token_ids) for sample in shard]),
    }


def _check_shard(path: Path, shard: list[Sample], layers: Sequence[int]) -> None:
    try:
        with safe_open(path, framework="pt") as reader:
            found = reader.metadata()
    except SafetensorError as error:
        raise ConfigError(f"{path}: {error}; remove it") from error
    if not set(layers) <= set(json.loads(found.pop("layers"))) or found != _shard_facts(shard):
        raise ConfigError(f"{path}: holds features of other samples or layers; remove it or name another folder")


@torch.inference_mode()
def hidden_states(decoder: Decoder, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> torch.Tensor:
    """Hidden states [num_tokens, len(layers), hidden_size] of whole sequences, one sequence after another.

    layers: after so many of the decoder's layers, or FINAL_NORM.
    """
    config, weights = decoder.config, decoder.weights
    lengths = [len(sequence) for sequence in sequences]
    device = weights.norm.device
    token_ids = torch.tensor([i for sequence in sequences for i in sequence], device=device)
    rotation = _rotation(decoder, torch.cat([torch.arange(n, device=device) for n in lengths]))
    x = weights.embedding.index_select(0, token_ids)
    found = {0: x}
    for index, layer in enumerate(weights.layers):
        window = config.sliding_window if config.window_layers[index] else None
        qkv = _qkv(decoder, layer, x, rotation if config.rope_layers[index] else None)
        x = layer.output.plus(_attend(decoder, qkv, lengths, window), x)
        gate, up = layer.gate_up(_norm(decoder, x, layer.mlp_norm)).chunk(2, dim=-1)
        x = layer.down.plus(F.silu(gate) * up, x)
        if index + 1 in layers:
            found[index + 1] = x
    found[FINAL_NORM] = _norm(decoder, x, weights.norm)
    return torch.stack([found[layer] for layer in layers], dim=1)


def _rotation(decoder: Decoder, positions: torch.Tensor) -> Rotation:
    cos, sin = (part.unsqueeze(1) for part in decoder.angles(positions.cpu()))
    both = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    cos, sin = (part.to(positions.device, decoder.dtype) for part in both)
    return cos, sin


def _qkv(decoder: Decoder, layer: LayerWeights, x: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
    """[num_tokens, num_heads + 2 · num_kv_heads, head_dim]."""
    config = decoder.config
    qkv = layer.qkv(_norm(decoder, x, layer.attention_norm)).view(len(x), -1, config.head_dim)
    qk = qkv[:, : config.num_heads + config.num_kv_heads]
    if layer.qk_norm is not None:
        qk.copy_(F.rms_norm(qk, qk.shape[-1:], None, config.rms_norm_eps) * layer.qk_norm)
    if rotation is not None:
        rotate(qk, rotation)
    return qkv


def _attend(decoder: Decoder, qkv: torch.Tensor, lengths: list[int], window: int | None) -> torch.Tensor:
    """[num_tokens, num_heads · head_dim]."""
    config = decoder.config
    groups = config.num_heads // config.num_kv_heads
    parts = []
    for sequence in torch.split(qkv, lengths):
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in torch.split(sequence, sizes, dim=1))
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))  # with enable_gqa it is three times slower
        mask = None
        if window is not None and window < len(sequence):
            seen = torch.ones(len(sequence), len(sequence), dtype=torch.bool, device=qkv.device)
            mask = seen.tril().triu(1 - window)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=decoder.scale)
        parts.append(attended[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)


def _norm(decoder: Decoder, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, decoder.config.rms_norm_eps)
