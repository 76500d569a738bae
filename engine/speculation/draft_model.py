"""Drafts by a smaller model of the same vocabulary, with a paged cache of its own.

Each sequence has a shadow: the same prompt, rules and seed, and an output that runs ahead. The draft model draws its
tokens as the target does, by the race with the sequence's own key (`engine.race`): where the two distributions agree,
so do the draws, under sampling too. What the target rejects is cut off the shadow, and its cache with it.

A shadow begins where its sequence does, wherever that was prefilled: the draft model reads the prompt itself, a chunk
in each step, and proposes nothing until it has caught up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import msgspec

from ...core.errors import ConfigError
from ..block_pool import BlockPool
from ..interface import Engine, EngineSpec, ScheduledSeq
from ..sequence import Sequence
from .interface import MAX_DRAFT_TOKENS, Draft
from .step_cost import StepCost

MAX_NEW_TOKENS = 256  # of a prompt that one step reads
SURENESS = 8  # kinds of a place, by how sure the draft model was


@dataclass(slots=True)
class _Chain:
    """One draft while it is drawn."""

    shadow: Sequence
    limit: int
    token_ids: list[int]
    kinds: list[int]

    def take(self, token_id: int, probability: float) -> None:
        place = min(len(self.token_ids), MAX_DRAFT_TOKENS - 1)
        self.kinds.append(place * SURENESS + min(int(probability * SURENESS), SURENESS - 1))
        self.token_ids.append(token_id)

    def goes_on(self, ending: frozenset[int]) -> bool:
        return len(self.token_ids) < self.limit and self.token_ids[-1] not in ending


class ModelProposer:
    """Drafts with `engine`, which nobody else uses."""

    name = "draft"
    num_kinds = MAX_DRAFT_TOKENS * SURENESS

    def __init__(self, engine: Engine, target: EngineSpec) -> None:
        """Raises ConfigError where the vocabularies differ in size."""
        spec = engine.spec
        if spec.vocab_size != target.vocab_size:
            raise ConfigError(
                f"speculation.method: the draft model has {spec.vocab_size} tokens, the model {target.vocab_size}; "
                "choose one with the same vocabulary"
            )
        self._engine, self._pool = engine, BlockPool(spec.num_blocks, spec.block_size, enable_prefix_cache=False)
        self._cost = StepCost(spec.step_costs) if spec.step_costs is not None else None
        self._shadows: dict[Sequence, Sequence] = {}

    def first_guess(self, kind: int) -> float:
        return (kind % SURENESS + 0.5) / SURENESS

    def seconds(self, num_seqs: int, num_cached: int) -> float:
        """Of one step of the draft model."""
        return self._cost.seconds(num_seqs, num_cached, 0) if self._cost is not None else 0.0

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        """See `Proposer.propose`. A kind is a place in the draft with how sure the draft model was."""
        chains = [_Chain(self._shadow(seq), limit, [], []) for seq, limit in zip(seqs, limits, strict=True)]
        self._read(chains)
        running = [chain for chain in chains if chain.limit > 0 and chain.shadow.num_uncomputed_tokens == 1]
        ending = self._engine.spec.eos_token_ids
        while running := [chain for chain in running if self._has_room(chain.shadow, 1)]:
            drawn = self._engine.execute([ScheduledSeq(chain.shadow, 1) for chain in running])
            for chain, (token,) in zip(running, drawn, strict=True):
                assert token.logprob is not None
                chain.shadow.num_computed_tokens += 1
                chain.shadow.output_ids.append(token.token_id)
                chain.take(token.token_id, math.exp(min(token.logprob.logprob, 0.0)))
            running = [chain for chain in running if chain.goes_on(ending)]
        return [Draft(tuple(chain.token_ids), tuple(chain.kinds)) for chain in chains]

    def _shadow(self, seq: Sequence) -> Sequence:
        """The shadow of `seq` with its tokens, and as much of its cache as is right."""
        shadow = self._shadows.get(seq)
        if shadow is None:
            params = msgspec.structs.replace(seq.params, logprobs=0)
            ids = list(seq.prompt_ids)
            shadow = Sequence(seq.key, seq.choice, ids, params, seq.hash_key, seq.arrival, seq.deadline)
            self._shadows[seq] = shadow
        agreed = _common(shadow.output_ids, seq.output_ids)
        shadow.num_computed_tokens = min(shadow.num_computed_tokens, shadow.num_prompt_tokens + agreed)
        shadow.output_ids[agreed:] = seq.output_ids[agreed:]
        return shadow

    def _read(self, chains: list[_Chain]) -> None:
        """Compute what shadows are behind by, but for their last token; a chunk of each."""
        entries: list[ScheduledSeq] = []
        for chain in chains:
            shadow = chain.shadow
            behind = min(shadow.num_uncomputed_tokens - 1, MAX_NEW_TOKENS)
            if behind > 0 and self._has_room(shadow, behind):
                entries.append(ScheduledSeq(shadow, behind))
        self._engine.execute(entries)
        for entry in entries:
            entry.seq.num_computed_tokens += entry.num_new_tokens

    def _has_room(self, shadow: Sequence, num_new: int) -> bool:
        """Blocks for so many tokens more; False where the pool or the model's window has none."""
        num_tokens = shadow.num_computed_tokens + num_new
        fits = num_tokens <= self._engine.spec.max_sequence_tokens
        return fits and self._pool.grow(shadow.block_table, num_tokens)

    def forget(self, seq: Sequence) -> None:
        shadow = self._shadows.pop(seq, None)
        if shadow is not None:
            self._pool.free(shadow.block_table[::-1])


def _common(one: list[int], other: list[int]) -> int:
    """How many leading ids are the same."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(n for n in range(shorter) if one[n] != other[n])
