"""What a worker needs from an engine. `engine.torch_engine` runs a model; `testing.fake_engine` runs arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..protocol.messages import Fingerprint, SampledToken
from .kv_memory import KVMemory
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSeq:
    """Compute `num_new_tokens` tokens of `seq`, from its num_computed_tokens on. The blocks for them are in its table.

    `sample` holds when these reach the sequence's end: then one token for each of `seq.choices` is drawn from the
    last logits.
    """

    seq: Sequence
    num_new_tokens: int

    @property
    def sample(self) -> bool:
        return self.seq.num_computed_tokens + self.num_new_tokens == self.seq.num_tokens


OnLayers = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """The fixed facts of an engine."""

    fingerprint: Fingerprint
    num_blocks: int
    block_size: int
    max_sequence_tokens: int  # longest prompt + output, by context window and by pool
    vocab_size: int
    eos_token_ids: frozenset[int]
    bytes_per_token: int
    saturation_tokens: int = 512  # a step of more new tokens computes each of them no faster

    @property
    def layer_bytes(self) -> int:
        """Of one layer of one block."""
        return self.bytes_per_token * self.block_size // self.fingerprint.num_layers


class Engine(Protocol):
    """Computes steps. Never touches the sequences' bookkeeping: the scheduler advances them when the step is done."""

    spec: EngineSpec
    memory: KVMemory

    def execute(self, batch: list[ScheduledSeq], on_layers: OnLayers | None = None) -> list[tuple[SampledToken, ...]]:
        """Run one step over a ragged batch; for each entry the sampled tokens (empty when it does not sample).

        `on_layers(n)` is called within the step, on its thread, when the first n layers of all new KV are written.

        Writes the KV of the new tokens into the entry's blocks and reads those of all earlier ones. Running the same
        entry again writes the same values. Raises for the whole batch; nothing of the sequences has changed then.
        """
        ...

    def rest(self) -> None:
        """No step follows for now: let go of what is held between steps."""
        ...
