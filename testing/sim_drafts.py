"""Drafts in the simulation: right as often as a seed says, so that every length of a draft is accepted and refused."""

from __future__ import annotations

import random
from collections.abc import Sequence as Sequences

from ..engine.sequence import Sequence
from ..engine.speculation.interface import Draft
from .fake_engine import next_tokens


class SeededProposer:
    """Proposes what `FakeEngine` draws next, each token wrong with a probability of 1 - `hit_rate`.

    Depends on the seed, the sequence and its length alone, like everything in a simulated run.
    """

    name = "seeded"
    num_kinds = 1

    def __init__(self, hit_rate: float, seed: int) -> None:
        self._hit_rate, self._seed = hit_rate, seed
        self.known: set[Sequence] = set()

    def seconds(self, num_seqs: int, num_cached: int) -> float:
        return 0.0

    def first_guess(self, kind: int) -> float:
        return self._hit_rate

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        return [self._propose(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]

    def _propose(self, seq: Sequence, limit: int) -> Draft:
        self.known.add(seq)
        rng = random.Random(f"{self._seed} {seq.key} {seq.choice} {seq.num_tokens}")
        right = next_tokens(seq, rng.randint(0, max(limit, 0)))
        token_ids = tuple(token if rng.random() < self._hit_rate else token + 1 for token in right)
        return Draft(token_ids, (0,) * len(token_ids))

    def forget(self, seq: Sequence) -> None:
        self.known.discard(seq)
