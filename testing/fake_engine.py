"""An engine that computes arithmetic in place of a model, and that no wrong cache can fool.

The "KV" of a token is a 64-bit value that depends on the token, its position and the value before it, different in
each layer. The next token depends on every value of the sequence in every layer, read back through the block table.
So a block that is missing, stale, swapped, torn or another request's changes the tokens, as it would with a model.
`expected_tokens` gives the right answer without any cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ..core.errors import InternalError
from ..core.random_bits import choice_seed, uniform
from ..engine.interface import EngineSpec, OnLayers, ScheduledSeq
from ..engine.kv_memory import KVMemory
from ..engine.sequence import Sequence
from ..protocol.messages import Fingerprint, SampledToken, TokenLogprob
from ..protocol.sampling import SamplingParams

_MASK = (1 << 64) - 1
_SLOT_BYTES = 8


def _mix(value: int) -> int:
    """One round of splitmix64 (Steele et al., OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


def _value(previous: int, token_id: int, layer: int) -> int:
    return _mix(previous ^ _mix(token_id << 8 | layer))


def _draw(
    state: int, params: SamplingParams, choice: int, index: int, vocab_size: int, eos: frozenset[int]
) -> SampledToken:
    """The token after a sequence whose cache folds to `state`:

    greedy from the state alone, else with the request's seed.
    """
    noise = 0 if params.is_greedy else int(uniform(choice_seed(params.seed, choice), index) * (1 << 53))
    token_id = _mix(state ^ noise) % vocab_size
    forbidden = (eos if not params.ignore_eos else frozenset()) | frozenset(params.stop_token_ids)
    if index < params.min_tokens:
        while token_id in forbidden:
            token_id = (token_id + 1) % vocab_size
    logprob = TokenLogprob(-math.log1p(state % 1000)) if params.logprobs is not None else None
    return SampledToken(token_id, logprob)


class FakeEngine:
    """Implements `engine.interface.Engine` on a few bytes per token.

    `cost_s` is what a step would take, for virtual time. `memory`: one that it shares with others, of this layout.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        num_layers: int = 2,
        vocab_size: int = 1000,
        *,
        model: str = "fake",
        step_s: float = 0.002,
        token_s: float = 0.0002,
        max_model_len: int = 1 << 16,
        fails: Callable[[ScheduledSeq], bool] | None = None,
        memory: KVMemory | None = None,
    ) -> None:
        fingerprint = Fingerprint(model, "fake", "u64", num_layers, 1, 1, block_size, "block-major")
        self._step_s, self._token_s, self._fails = step_s, token_s, fails
        self.memory = memory or KVMemory(num_blocks, num_layers, block_size * _SLOT_BYTES)
        self.spec = EngineSpec(
            fingerprint=fingerprint,
            num_blocks=num_blocks,
            block_size=block_size,
            max_sequence_tokens=min(num_blocks * block_size, max_model_len),
            vocab_size=vocab_size,
            eos_token_ids=frozenset({0}),
            bytes_per_token=num_layers * _SLOT_BYTES,
        )

    def cost_s(self, batch: list[ScheduledSeq]) -> float:
        return self._step_s + self._token_s * sum(entry.num_new_tokens for entry in batch)

    def execute(self, batch: list[ScheduledSeq], on_layers: OnLayers | None = None) -> list[tuple[SampledToken, ...]]:
        for entry in batch:
            if self._fails is not None and self._fails(entry):
                raise InternalError(f"the fake engine refuses {entry.seq.key}")
        for layer in range(self.memory.num_layers):
            for entry in batch:
                self._compute(entry, layer)
            if on_layers is not None:
                on_layers(layer + 1)
        return [self._sample(entry) for entry in batch]

    def rest(self) -> None:
        """Nothing is held."""

    def _compute(self, entry: ScheduledSeq, layer: int) -> None:
        seq, start = entry.seq, entry.seq.num_computed_tokens
        value = self._read(seq, layer, start - 1) if start else 0
        for position, token_id in enumerate(seq.tokens(start, start + entry.num_new_tokens), start):
            value = _value(value, token_id, layer)
            self._write(seq, layer, position, value)

    def _sample(self, entry: ScheduledSeq) -> tuple[SampledToken, ...]:
        if not entry.sample:
            return ()
        seq, stop = entry.seq, entry.seq.num_computed_tokens + entry.num_new_tokens
        state = _fold(self._read(seq, layer, p) for layer in range(self.memory.num_layers) for p in range(stop))
        index = len(seq.output_ids)
        spec = self.spec
        return tuple(_draw(state, seq.params, c, index, spec.vocab_size, spec.eos_token_ids) for c in seq.choices)

    def _slot(self, seq: Sequence, layer: int, position: int) -> memoryview:
        block, offset = divmod(position, self.spec.block_size)
        return self.memory.block(seq.block_table[block], layer, 1)[offset * _SLOT_BYTES : (offset + 1) * _SLOT_BYTES]

    def _read(self, seq: Sequence, layer: int, position: int) -> int:
        return int.from_bytes(self._slot(seq, layer, position), "little")

    def _write(self, seq: Sequence, layer: int, position: int, value: int) -> None:
        self._slot(seq, layer, position)[:] = value.to_bytes(_SLOT_BYTES, "little")


def _fold(values: Iterator[int]) -> int:
    state = 0
    for value in values:
        state = _mix(state ^ value)
    return state


def expected_tokens(
    prompt_ids: list[int], params: SamplingParams, choice: int = 0, *, vocab_size: int = 1000, num_layers: int = 2
) -> tuple[list[int], str]:
    """(token ids, finish reason) of a fault-free run of FakeEngine, computed without a cache."""
    eos = frozenset({0})
    output: list[int] = []
    columns: list[list[int]] = [[] for _ in range(num_layers)]
    pending = list(prompt_ids)
    while True:
        for layer, column in enumerate(columns):
            for token_id in pending:
                column.append(_value(column[-1] if column else 0, token_id, layer))
        token = _draw(
            _fold(v for column in columns for v in column), params, choice, len(output), vocab_size, eos
        ).token_id
        if token in params.stop_token_ids or (token in eos and not params.ignore_eos):
            return output, "stop"
        output.append(token)
        if len(output) >= params.max_tokens:
            return output, "length"
        pending = [token]
