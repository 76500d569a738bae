"""An engine that computes arithmetic in place of a model, and that no wrong cache can fool.

The "KV" of a token is a 64-bit value that depends on the token, its position and the value before it, different in
each layer. The next token depends on every value of the sequence in every layer, read back through the block table.
So a block that is missing, stale, swapped, torn or another request's changes the tokens, as it would with a model.
`expected_run` gives the right answer without any cache, `kv_values` the right content of one.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from struct import Struct

import xxhash

from ..core.errors import InternalError
from ..core.random_bits import choice_seed, uniform
from ..engine.draft_tree import ROOT, follow
from ..engine.interface import EngineSpec, OnLayers, ScheduledSeq
from ..engine.kv_memory import KVMemory
from ..engine.sequence import Sequence as SequenceOfTokens
from ..protocol.messages import Fingerprint, SampledToken, TokenLogprob
from ..protocol.sampling import SamplingParams

_MASK = (1 << 64) - 1
SLOT_BYTES = 8
_pair = Struct("<QQ").pack
_VOCAB_SIZE, NUM_LAYERS, _EOS = 1000, 2, frozenset({0})


def _mix(value: int) -> int:
    """One round of splitmix64 (Steele et al., OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


def _value(previous: int, token_id: int, layer: int) -> int:
    return xxhash.xxh3_64_intdigest(_pair(previous, token_id << 8 | layer))


def _extend(values: array[int], token_ids: Iterable[int], layer: int, salt: int) -> None:
    """Append the KV of `token_ids`, which come behind those of `values`. `salt` stands for the weights."""
    value = values[-1] if values else salt
    for token_id in token_ids:
        value = _value(value, token_id, layer)
        values.append(value)


def kv_values(token_ids: Iterable[int], num_layers: int = NUM_LAYERS, salt: int = 0) -> list[array[int]]:
    """What each layer of a cache must hold of these tokens: 64-bit values, one for each."""
    columns = [array("Q") for _ in range(num_layers)]
    tokens = list(token_ids)
    for layer, column in enumerate(columns):
        _extend(column, tokens, layer, salt)
    return columns


def _touched(state: int, params: SamplingParams, output_ids: Sequence[int]) -> int:
    """Penalties and biases change what is drawn: a request that is served with another's shows it."""
    if params.has_penalties:
        state = _mix(state ^ sum(map(_mix, output_ids)) & _MASK)
    for token_id, bias in sorted(params.logit_bias.items()):
        state = _mix(state ^ token_id ^ int(bias * 1000) & _MASK)
    return state


def _draw(
    state: int, params: SamplingParams, choice: int, output_ids: Sequence[int], vocab_size: int, eos: frozenset[int]
) -> SampledToken:
    """The token after a sequence whose cache folds to `state`: greedy from that alone, else with the request's seed."""
    index = len(output_ids)
    noise = 0 if params.is_greedy else int(uniform(choice_seed(params.seed, choice), index) * (1 << 53))
    state = _touched(state, params, output_ids)
    token_id = _mix(state ^ noise) % vocab_size
    forbidden = (eos if not params.ignore_eos else frozenset()) | frozenset(params.stop_token_ids)
    if index < params.min_tokens:
        while token_id in forbidden:
            token_id = (token_id + 1) % vocab_size
    if params.logprobs is None:
        return SampledToken(token_id)
    top = tuple((_mix(state + place) % vocab_size, -float(place)) for place in range(params.logprobs))
    return SampledToken(token_id, TokenLogprob(-math.log1p(state % 1000), top))


class FakeEngine:
    """Implements `engine.interface.Engine` on a few bytes per token.

    `cost_s` is what a step would take, for virtual time. Another `weights` gives other values. `memory`: one that it
    shares with others, of this layout.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        num_layers: int = NUM_LAYERS,
        vocab_size: int = _VOCAB_SIZE,
        *,
        model: str = "fake",
        weights: str = "fake",
        step_s: float = 0.002,
        token_s: float = 0.0002,
        max_model_len: int = 1 << 16,
        fails: Callable[[ScheduledSeq], bool] | None = None,
        memory: KVMemory | None = None,
    ) -> None:
        fingerprint = Fingerprint(model, weights, "u64", num_layers, 1, 1, block_size, "block-major")
        self._step_s, self._token_s, self._fails = step_s, token_s, fails
        self._salt = 0 if weights == "fake" else xxhash.xxh3_64_intdigest(weights.encode())
        self.memory = memory or KVMemory(num_blocks, num_layers, block_size * SLOT_BYTES)
        self._slots = self.memory.buffer.cast("Q")
        self.spec = EngineSpec(
            fingerprint=fingerprint,
            num_blocks=num_blocks,
            block_size=block_size,
            max_sequence_tokens=min(num_blocks * block_size, max_model_len),
            vocab_size=vocab_size,
            eos_token_ids=_EOS,
            bytes_per_token=num_layers * SLOT_BYTES,
            takes_trees=True,
        )

    def cost_s(self, batch: list[ScheduledSeq]) -> float:
        return self._step_s + self._token_s * sum(entry.num_step_tokens for entry in batch)

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

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        self._slots.release()
        self.memory.close()

    def read(self, block_table: Sequence[int], layer: int, num_tokens: int) -> bytes:
        """What the cache holds of the first `num_tokens` tokens of a sequence with this table, in one layer."""
        size, slots = self.spec.block_size, self._slots
        starts = islice(self._starts(block_table, layer), -(-num_tokens // size))
        parts = (slots[start : start + size] for start in starts)
        return b"".join(parts)[: num_tokens * SLOT_BYTES]

    def _starts(self, block_table: Sequence[int], layer: int) -> Iterable[int]:
        """Where each block's slots of one layer begin."""
        size, num_layers = self.spec.block_size, self.memory.num_layers
        return ((block * num_layers + layer) * size for block in block_table)

    def _slots_of(self, entry: ScheduledSeq, layer: int) -> list[int]:
        """Where the values of the entry's tokens lie, from the first of the sequence to the last drafted one."""
        size, begins = self.spec.block_size, list(self._starts(entry.seq.block_table, layer))
        stop = entry.seq.num_computed_tokens + entry.num_step_tokens
        return [begins[position // size] + position % size for position in range(stop)]

    def _compute(self, entry: ScheduledSeq, layer: int) -> None:
        seq, start = entry.seq, entry.seq.num_computed_tokens
        places, slots = self._slots_of(entry, layer), self._slots
        value = slots[places[start - 1]] if start else self._salt
        known = start + entry.num_new_tokens
        for place, token_id in zip(places[start:known], seq.tokens(start, known), strict=True):
            value = slots[place] = _value(value, token_id, layer)
        for drafted, (place, token_id) in enumerate(zip(places[known:], entry.draft, strict=True)):
            parent = entry.parents[drafted] if entry.parents else drafted - 1
            slots[place] = _value(slots[places[known + parent]], token_id, layer)

    def _sample(self, entry: ScheduledSeq) -> tuple[SampledToken, ...]:
        if not entry.sample:
            return ()
        if not entry.draft:
            return tuple(self._drawn(entry, choice, ()) for choice in entry.seq.choices)
        tokens: list[SampledToken] = []
        path: list[int] = []
        at: int | None = ROOT
        while at is not None:
            tokens.append(self._drawn(entry, entry.seq.choice, tuple(path)))
            at = follow(entry.draft, entry.parents, at, tokens[-1].token_id)
            path += [] if at is None else [at]
        self._keep(entry, path)
        return tuple(tokens)

    def _drawn(self, entry: ScheduledSeq, choice: int, path: tuple[int, ...]) -> SampledToken:
        """The token behind the entry's sequence and the drafted tokens on `path`."""
        seq, spec = entry.seq, self.spec
        state = _fold(self._seen(entry, layer, path) for layer in range(self.memory.num_layers))
        output_ids = [*seq.output_ids, *(entry.draft[at] for at in path)]
        return _draw(state, seq.params, choice, output_ids, spec.vocab_size, spec.eos_token_ids)

    def _seen(self, entry: ScheduledSeq, layer: int, path: tuple[int, ...]) -> bytes:
        """What the cache holds of the sequence and of the drafted tokens on `path`, in one layer."""
        known = self.read(entry.seq.block_table, layer, entry.seq.num_tokens)
        if not path:
            return known
        places = self._slots_of(entry, layer)[entry.seq.num_tokens :]
        return known + b"".join(self._slots[places[at]].to_bytes(SLOT_BYTES, sys.byteorder) for at in path)

    def _keep(self, entry: ScheduledSeq, path: list[int]) -> None:
        """The values of what was accepted move up, side by side."""
        for layer in range(self.memory.num_layers):
            places = self._slots_of(entry, layer)[entry.seq.num_tokens :]
            for place, at in enumerate(path):
                self._slots[places[place]] = self._slots[places[at]]


def _fold(columns: Iterable[bytes]) -> int:
    """One number that depends on every bit of every layer."""
    return xxhash.xxh3_64_intdigest(b"".join(columns))


def expected_run(
    prompt_ids: list[int],
    params: SamplingParams,
    choice: int = 0,
    *,
    vocab_size: int = _VOCAB_SIZE,
    num_layers: int = NUM_LAYERS,
) -> tuple[list[SampledToken], str]:
    """(tokens, finish reason) of a fault-free run of FakeEngine with nobody beside it, computed without a cache."""
    output: list[SampledToken] = []
    for token in _endless_run(prompt_ids, [], params, choice, vocab_size, num_layers):
        if token.token_id in params.stop_token_ids or (token.token_id in _EOS and not params.ignore_eos):
            break
        output.append(token)
        if len(output) >= params.max_tokens:
            return output, "length"
    return output, "stop"


def _endless_run(
    prompt_ids: list[int],
    output_ids: list[int],
    params: SamplingParams,
    choice: int,
    vocab_size: int = _VOCAB_SIZE,
    num_layers: int = NUM_LAYERS,
) -> Iterator[SampledToken]:
    """What is drawn behind `output_ids`, as if nothing ever ended."""
    output = list(output_ids)
    columns = kv_values([*prompt_ids, *output], num_layers)
    while True:
        state = _fold(column.tobytes() for column in columns)
        token = _draw(state, params, choice, output, vocab_size, _EOS)
        yield token
        output.append(token.token_id)
        for layer, column in enumerate(columns):
            _extend(column, (token.token_id,), layer, 0)


def next_tokens(seq: SequenceOfTokens, count: int) -> list[int]:
    """The ids that a fault-free run draws behind `seq`."""
    run = _endless_run(seq.prompt_ids, seq.output_ids, seq.params, seq.choice)
    return [token.token_id for token in islice(run, count)]


def expected_tokens(
    prompt_ids: list[int],
    params: SamplingParams,
    choice: int = 0,
    *,
    vocab_size: int = _VOCAB_SIZE,
    num_layers: int = NUM_LAYERS,
) -> tuple[list[int], str]:
    """(token ids, finish reason) of the same run."""
    tokens, reason = expected_run(prompt_ids, params, choice, vocab_size=vocab_size, num_layers=num_layers)
    return [token.token_id for token in tokens], reason
