"""The engine that runs a real model with torch."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from ..core.errors import ConfigError
from ..kernels.paged_attention.pool import KVPool
from ..models.checkpoint import open_checkpoint
from ..models.config import ModelConfig
from ..models.decoder import Decoder, load_decoder
from ..protocol.messages import Fingerprint, SampledToken
from .interface import EngineSpec, ScheduledSeq
from .kv_memory import KVMemory
from .model_runner import ModelRunner
from .sampler import SampleRow, sample

log = logging.getLogger(__name__)

LAYOUT = "block-major-pairs"  # block-major, K rotated with pairs side by side
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIN_BLOCKS = 2


class TorchEngine:
    """Implements `engine.interface.Engine`. Several engines may share one decoder: it holds weights only."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        model_name: str,
        identity: str,
        num_blocks: int,
        block_size: int = 16,
        max_model_len: int | None = None,
    ) -> None:
        config = decoder.config
        self._block_shape = (2, block_size, config.num_kv_heads, config.head_dim)
        self.memory = KVMemory(num_blocks, config.num_layers, _layer_bytes(config, decoder.dtype, block_size))
        self._pool = KVPool(_pool_tensor(self.memory, config.num_layers, self._block_shape, decoder.dtype))
        self._runner = ModelRunner(decoder, self._pool)
        self.spec = EngineSpec(
            fingerprint=Fingerprint(
                model=model_name,
                weights=identity,
                dtype=str(decoder.dtype).removeprefix("torch."),
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                block_size=block_size,
                layout=LAYOUT,
            ),
            num_blocks=num_blocks,
            block_size=block_size,
            max_sequence_tokens=min(max_model_len or config.max_position, config.max_position, num_blocks * block_size),
            vocab_size=config.vocab_size,
            eos_token_ids=frozenset(config.eos_token_ids),
            bytes_per_token=self.memory.block_bytes // block_size,
        )

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        model_name: str,
        dtype: str = "auto",
        num_blocks: int | None = None,
        kv_bytes: int = 1 << 30,
        block_size: int = 16,
        max_model_len: int | None = None,
        num_threads: int | None = None,
    ) -> TorchEngine:
        """Read the model at `path`. `num_blocks` wins over `kv_bytes`. Raises ModelFileError, or ConfigError for a tiny cache."""
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        checkpoint = open_checkpoint(path)
        config, chosen = checkpoint.config, pick_dtype(dtype)
        decoder = load_decoder(config, checkpoint.tensors(), chosen, max_model_len or config.max_position)
        block_bytes = _layer_bytes(config, chosen, block_size) * config.num_layers
        blocks = num_blocks if num_blocks is not None else kv_bytes // block_bytes
        if blocks < MIN_BLOCKS:
            raise ConfigError(f"the KV cache holds {blocks} blocks of {block_bytes} bytes; give it at least {MIN_BLOCKS * block_bytes}")
        log.info("%s in %s, %d KV blocks of %d tokens", model_name, chosen, blocks, block_size)
        return cls(
            decoder,
            model_name=model_name,
            identity=checkpoint.identity,
            num_blocks=blocks,
            block_size=block_size,
            max_model_len=max_model_len,
        )

    def execute(self, batch: list[ScheduledSeq]) -> list[tuple[SampledToken, ...]]:
        ragged, logits = self._runner.run(batch)
        rows = [
            SampleRow(batch[entry].seq, choice, row)
            for row, entry in enumerate(ragged.sample_entries)
            for choice in batch[entry].seq.choices
        ]
        found: list[tuple[SampledToken, ...]] = [()] * len(batch)
        if not rows:
            return found
        with torch.inference_mode():
            tokens = iter(sample(logits, rows, self.spec.eos_token_ids))
        for entry in ragged.sample_entries:
            found[entry] = tuple(next(tokens) for _ in batch[entry].seq.choices)
        return found


def pick_dtype(name: str) -> torch.dtype:
    """`auto` is bfloat16 where the machine multiplies it natively, else float32. Raises ConfigError."""
    if name == "auto":
        return torch.bfloat16 if has_native_bfloat16() else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def has_native_bfloat16() -> bool:
    """The CPU has bfloat16 dot products (AVX512-BF16 or AMX), or there is a GPU."""
    if torch.cuda.is_available():
        return True
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return False
    words = set(flags.read_text(encoding="ascii", errors="replace").split())
    return bool(words & {"avx512_bf16", "amx_bf16"})


def _layer_bytes(config: ModelConfig, dtype: torch.dtype, block_size: int) -> int:
    return 2 * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def _pool_tensor(memory: KVMemory, num_layers: int, block_shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The shared region as [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]; no copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.frombuffer(memory.buffer, dtype=dtype)
    return flat.view(memory.num_blocks, num_layers, *block_shape)
