"""Drafts by a smaller model of the same vocabulary, with a paged cache of its own.

Each sequence has a shadow: the same prompt, rules and seed, and an output that runs ahead. The draft model draws its
tokens as the target does, by the race with the sequence's own key (`engine.race`): where the two distributions agree,
so do the draws, under sampling too. The tokens that it holds likeliest beside the one drawn are leaves (`comb`). What
the target rejects is cut off the shadow, and its cache with it.

A shadow begins where its sequence does, wherever that was prefilled: the draft model reads the prompt itself, a chunk
in each step, and proposes nothing until it has caught up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

import msgspec

from ...core.errors import ConfigError
from ...protocol.messages import TokenLogprob
from ..block_pool import BlockPool
from ..interface import Engine, EngineSpec, ScheduledSeq
from ..sequence import Sequence
from .comb import NUM_KINDS, RUNNERS_UP, Comb, first_guess
from .interface import MAX_DRAFT_TOKENS, Draft
from .step_cost import StepCost

MAX_NEW_TOKENS = 256  # of a prompt that one step reads


@dataclass(slots=True)
class _Run:
    """One draft while it is drawn."""

    shadow: Sequence
    limit: int
    comb: Comb = field(default_factory=Comb)

    def take(self, token_id: int, logprob: TokenLogprob) -> None:
        others = [other for other in logprob.top if other[0] != token_id][:RUNNERS_UP]
        logprobs = [logprob.logprob, *(value for _, value in others)]
        self.comb.grow([token_id, *(other for other, _ in others)], [math.exp(min(value, 0.0)) for value in logprobs])

    def goes_on(self, ending: frozenset[int]) -> bool:
        token_ids = self.comb.token_ids
        return len(token_ids) < min(self.limit, MAX_DRAFT_TOKENS) and token_ids[-1] not in ending


class ModelProposer:
    """Drafts with `engine`, which nobody else uses."""

    name = "draft"
    num_kinds = NUM_KINDS

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
        return first_guess(kind)

    def seconds(self, num_seqs: int, num_cached: int) -> float:
        """Of one step of the draft model."""
        return self._cost.seconds(num_seqs, num_cached, 0) if self._cost is not None else 0.0

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        """See `Proposer.propose`. Kinds are those of `comb`."""
        runs = [_Run(self._shadow(seq), limit) for seq, limit in zip(seqs, limits, strict=True)]
        self._read(runs)
        running = [run for run in runs if run.limit > 0 and run.shadow.num_uncomputed_tokens == 1]
        ending = self._engine.spec.eos_token_ids
        while running := [run for run in running if self._has_room(run.shadow, 1)]:
            drawn = self._engine.execute([ScheduledSeq(run.shadow, 1) for run in running])
            for run, (token,) in zip(running, drawn, strict=True):
                assert token.logprob is not None
                run.shadow.num_computed_tokens += 1
                run.shadow.output_ids.append(token.token_id)
                run.take(token.token_id, token.logprob)
            running = [run for run in running if run.goes_on(ending)]
        return [run.comb.draft(MAX_DRAFT_TOKENS) for run in runs]

    def _shadow(self, seq: Sequence) -> Sequence:
        """The shadow of `seq` with its tokens, and as much of its cache as is right."""
        shadow = self._shadows.get(seq)
        if shadow is None:
            params = msgspec.structs.replace(seq.params, logprobs=1 + RUNNERS_UP)
            ids = list(seq.prompt_ids)
            shadow = Sequence(seq.key, seq.choice, ids, params, seq.hash_key, seq.arrival, seq.deadline)
            self._shadows[seq] = shadow
        agreed = _common(shadow.output_ids, seq.output_ids)
        shadow.num_computed_tokens = min(shadow.num_computed_tokens, shadow.num_prompt_tokens + agreed)
        shadow.output_ids[agreed:] = seq.output_ids[agreed:]
        return shadow

    def _read(self, runs: list[_Run]) -> None:
        """Compute what shadows are behind by, but for their last token; a chunk of each."""
        entries: list[ScheduledSeq] = []
        for run in runs:
            shadow = run.shadow
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
