"""The engine that runs a model with torch: batch → network → sampler, over a pool that other processes can map.

The worker's process calls `execute` from one thread. Threads inside torch: see `threads`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from ..core.errors import ConfigError
from ..kernels.native.library import level
from ..kernels.quant_linear.op import QuantLinear, is_native
from ..models.checkpoint import Checkpoint, open_checkpoint
from ..models.config import ModelConfig
from ..models.decoder import Decoder
from ..models.weights import Weight, load_weights
from ..protocol.messages import Fingerprint, SampledToken
from .accepted import drawn_rows, moved_slots
from .batch import build_batch
from .interface import EngineSpec, OnLayers, ScheduledSeq
from .kv_memory import DEFAULT_KV_BYTES, KVMemory, blocks_in
from .model_runner import ModelRunner, layer_bytes, pool_view
from .saturation import measure_saturation, measure_steps
from .verify import draw

LAYOUT = "block-major"
STAGING_BYTES = 512 << 20  # likewise: only links that convert what they carry use it

Progress = Callable[[int, int], None]
Observe = Callable[[list[ScheduledSeq], list[tuple[SampledToken, ...]], torch.Tensor], None]
MakeMemory = Callable[[int, int, int], KVMemory]  # (num_blocks, num_layers, layer_bytes) → memory of as many or more


class TorchEngine:
    """Implements `engine.interface.Engine`. Engines built on one `decoder` share its weights; each has its own pool."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        model_name: str,
        identity: str,
        num_blocks: int,
        block_size: int = 16,
        make_memory: MakeMemory | None = None,
    ) -> None:
        config, dtype = decoder.config, decoder.cache_dtype
        self.decoder, self.identity = decoder, identity
        make_memory = make_memory or _own_memory
        self.memory = make_memory(num_blocks, config.num_layers, layer_bytes(config, block_size, dtype))
        self._runner = ModelRunner(decoder, pool_view(self.memory, config, block_size, dtype))
        self._block_size = block_size
        self._observe: Observe | None = None
        self.network_s = 0.0  # seconds within the network so far, for measurements
        self.spec = EngineSpec(
            fingerprint=Fingerprint(
                model=model_name,
                weights=_cache_identity(identity, decoder),
                dtype=_dtype_name(dtype),
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                block_size=block_size,
                layout=LAYOUT,
            ),
            num_blocks=num_blocks,
            block_size=block_size,
            max_sequence_tokens=min(decoder.max_context, num_blocks * block_size),
            vocab_size=config.vocab_size,
            eos_token_ids=frozenset(config.eos_token_ids),
            bytes_per_token=config.num_layers * layer_bytes(config, 1, dtype),
            takes_trees=True,
        )

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        model_name: str,
        dtype: str = "auto",
        quantization: str = "auto",
        num_blocks: int | None = None,
        kv_bytes: int = DEFAULT_KV_BYTES,
        block_size: int = 16,
        max_model_len: int | None = None,
        num_threads: int | None = None,
        measures_chunks: bool = False,
        measures_steps: int = 0,
        progress: Progress | None = None,
        make_memory: MakeMemory | None = None,
    ) -> TorchEngine:
        """Load the model at `path`. The pool has `num_blocks` blocks, or as many as fit in `kv_bytes`.

        `make_memory`: where the blocks lie, when they are not to have a memory of their own.
        `quantization`: see `resolve_grouping`. `measures_chunks`: find out `spec.saturation_tokens`;
        `measures_steps`: `spec.step_costs`, for steps of up to so many tokens. Sets torch's number of threads for the
        whole process. Raises ModelFileError or ConfigError.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        checkpoint = open_checkpoint(path)
        config, kind = checkpoint.config, resolve_dtype(dtype)
        blocks = num_blocks or blocks_in(kv_bytes, config.num_layers * layer_bytes(config, block_size, kind))
        grouped = resolve_grouping(quantization, dtype, checkpoint)
        tensors = checkpoint.grouped_tensors() if grouped else checkpoint.tensors()
        context = _max_context(config, max_model_len)
        decoder = build_decoder(config, tensors, kind, context, progress, grouped=grouped)
        engine = cls(
            decoder,
            model_name=model_name,
            identity=checkpoint.identity,
            num_blocks=blocks,
            block_size=block_size,
            make_memory=make_memory,
        )
        engine.set_num_threads(torch.get_num_threads())
        if measures_chunks:
            chunk = measure_saturation(decoder, block_size, engine.num_threads)
            engine.spec = replace(engine.spec, saturation_tokens=chunk)
        if measures_steps:
            engine.spec = replace(
                engine.spec, step_costs=measure_steps(decoder, block_size, engine.num_threads, measures_steps)
            )
        return engine

    def set_num_threads(self, num_threads: int) -> None:
        """Threads of the steps from now on; sets torch's for the whole process."""
        self._runner.set_num_threads(num_threads)

    def execute(self, batch: list[ScheduledSeq], on_layers: OnLayers | None = None) -> list[tuple[SampledToken, ...]]:
        """See `Engine.execute`."""
        if not batch:
            return []
        inputs = build_batch(batch, self._block_size)
        started = time.perf_counter()
        result = self._runner.step(inputs, on_layers)
        self.network_s += time.perf_counter() - started
        drawn = draw(result, batch, self.spec.eos_token_ids)
        if inputs.tree is not None:
            self._runner.move(*moved_slots(inputs, batch, drawn))
        if self._observe is not None and result.features is not None:
            self._observe(batch, drawn, result.features[drawn_rows(batch, drawn)])
        return drawn

    def show_steps(self, taps: tuple[int, ...], observe: Observe | None) -> None:
        """Show `observe` each step that samples: what was drawn, and the hidden states `taps` (`models.decoder.Taps`)
        of the rows it was drawn from (`drawn_rows`). A draft head asks for it; there is one at most, none with None.
        """
        self._runner.taps, self._observe = taps, observe

    @property
    def quantization(self) -> str:
        """How the weights are kept: "grouped" as 4 or 8 bits, or "none"."""
        return "grouped" if isinstance(self.decoder.weights.head, QuantLinear) else "none"

    @property
    def is_native(self) -> bool:
        """Steps run in the native kernel."""
        return self._runner.is_native

    @property
    def num_threads(self) -> int:
        """Threads of a step."""
        return self._runner.num_threads

    @property
    def native_level(self) -> str:
        """The level of instructions of the native step, or "off" where torch computes."""
        return (level() or "off") if self._runner.is_native else "off"

    def rest(self) -> None:
        """See `Engine.rest`; nothing is held here."""


def build_decoder(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Weight]],
    dtype: torch.dtype,
    max_context: int | None = None,
    progress: Progress | None = None,
    *,
    grouped: bool = False,
) -> Decoder:
    """The network of `config` with these weights.

    Sequences may have up to `max_context` tokens, by default the model's window. With `grouped` weights it computes in
    float32, and `dtype` is that of the cache.
    """
    weights = load_weights(config, tensors, torch.float32 if grouped else dtype, progress, grouped)
    return Decoder(config, weights, max_context or config.max_position, dtype)


def resolve_dtype(name: str) -> torch.dtype:
    """The type that `name` stands for; "auto" is bfloat16 where this CPU multiplies it natively. Raises ConfigError."""
    match name:
        case "auto":
            return torch.bfloat16 if _has_native_bfloat16() else torch.float32
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "float16":
            return torch.float16
        case _:
            raise ConfigError(f"model.dtype: {name!r} is not one of auto, float32, bfloat16, float16")


def resolve_grouping(name: str, dtype: str, checkpoint: Checkpoint) -> bool:
    """Whether matrices are multiplied as grouped weights: "none" never, "int8" always (what is stored in groups of 4 or
    8 bits stays as it is), "auto" where they are stored so, the native kernels are here and `dtype` is "auto".

    Raises ConfigError for another name.
    """
    match name:
        case "none":
            return False
        case "int8":
            return True
        case "auto":
            return dtype == "auto" and checkpoint.is_grouped and is_native()
        case _:
            raise ConfigError(f"model.quantization: {name!r} is not one of auto, none, int8")


def _has_native_bfloat16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in probes if hasattr(torch.cpu, name))


def _cache_identity(identity: str, decoder: Decoder) -> str:
    """What decides the bytes in the cache: the weights, and for two kinds of rotary scaling the longest context."""
    depends = decoder.config.rope_scaling.kind in ("dynamic", "longrope")
    return f"{identity}@{decoder.max_context}" if depends else identity


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _max_context(config: ModelConfig, max_model_len: int | None) -> int:
    if max_model_len is not None and max_model_len > config.max_position:
        raise ConfigError(
            f"model.max_model_len: {max_model_len} is beyond the model's window of {config.max_position} tokens"
        )
    return max_model_len or config.max_position


def _own_memory(num_blocks: int, num_layers: int, nbytes: int) -> KVMemory:
    return KVMemory(num_blocks, num_layers, nbytes, STAGING_BYTES)
