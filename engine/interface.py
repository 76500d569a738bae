"""What a worker needs from an engine. `engine.torch_engine` runs a model; `testing.fake_engine` runs arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..protocol.messages import Fingerprint, SampledToken
from .draft_tree import CHAIN, Parents
from .kv_memory import KVMemory
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSeq:
    """Compute `num_new_tokens` tokens of `seq`, from its num_computed_tokens on. The blocks for them are in its table.

    `sample` holds when these reach the sequence's end: then one token for each of `seq.choices` is drawn from the
    last logits. `draft`: tokens that may follow, of an entry that samples for one choice. They are computed with the
    others, and as many of them as are what the sequence draws anyway are its next tokens, with one more behind them.
    `parents`: which of them each follows, where they are a tree (`draft_tree`); only for an engine that `takes_trees`.
    """

    seq: Sequence
    num_new_tokens: int
    draft: tuple[int, ...] = ()
    parents: Parents = CHAIN

    @property
    def num_step_tokens(self) -> int:
        """Tokens that the step computes for it."""
        return self.num_new_tokens + len(self.draft)

    @property
    def sample(self) -> bool:
        return self.seq.num_computed_tokens + self.num_new_tokens == self.seq.num_tokens


OnLayers = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What a decode step takes on this machine. curve: (tokens, seconds), ascending, with next to nothing cached.
    context_s: for each cached token of a sequence; query_s: for each that a further token of the sequence looks at.
    """

    curve: tuple[tuple[int, float], ...]
    context_s: float
    query_s: float


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
    step_costs: StepCosts | None = None  # None: not measured
    takes_trees: bool = False  # drafts may be trees; else they are chains

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

        An entry with a draft gets the drafted tokens that its sequence draws, up to the first other one, and this one
        too: one to len(draft) + 1 tokens, the same that as many steps without a draft give. Of a tree these are the
        tokens of one path, whose KV then lies in consecutive slots, as if they alone had been computed.

        `on_layers(n)` is called within the step, on its thread, when the first n layers of all new KV are written.

        Writes the KV of the new tokens into the entry's blocks and reads those of all earlier ones. Running the same
        entry again writes the same values of the tokens that count. Raises for the whole batch; nothing of the
        sequences has changed then.
        """
        ...

    def rest(self) -> None:
        """No step follows for now: let go of what is held between steps."""
        ...
