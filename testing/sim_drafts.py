"""Drafts in the simulation: right as often as a seed says, so that every length of a draft is accepted and refused, and
trees whose paths lie anywhere among their tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Sequences

from ..engine.draft_tree import ROOT
from ..engine.sequence import Sequence
from ..engine.speculation.interface import Draft
from .fake_engine import next_tokens

Know = Callable[[Sequence, int], list[int]]  # a sequence and a number → the next so many tokens


class SeededProposer:
    """Proposes what is drawn next, by default by `FakeEngine`, each token wrong with a probability of 1 - `hit_rate`; a
    share of its drafts are trees, with wrong tokens beside the others, now and then with more behind them.

    Depends on the seed, the sequence and its length alone, like everything in a simulated run.
    """

    name = "seeded"
    num_kinds = 1

    def __init__(self, hit_rate: float, seed: int, trees: float = 0.5, know: Know = next_tokens) -> None:
        self._hit_rate, self._seed, self._trees, self._know = hit_rate, seed, trees, know
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
        right = self._know(seq, rng.randint(0, max(limit, 0)))
        chain = [token if rng.random() < self._hit_rate else _other(token, 1) for token in right]
        if rng.random() >= self._trees:
            return Draft(tuple(chain), (0,) * len(chain))
        return _branched(chain, limit, rng)

    def forget(self, seq: Sequence) -> None:
        self.known.discard(seq)


def _branched(chain: list[int], limit: int, rng: random.Random) -> Draft:
    """`chain` with other tokens between and behind its own, `limit` in all."""
    token_ids: list[int] = []
    parents: list[int] = []
    at = ROOT
    for token in chain:
        for other in range(rng.randint(0, 2)):
            parents.append(at if rng.random() < 0.7 else rng.randint(ROOT, len(token_ids) - 1))
            token_ids.append(_other(token, 2 + other))
        parents.append(at)
        token_ids.append(token)
        at = len(token_ids) - 1
    return Draft(tuple(token_ids), (0,) * len(token_ids), tuple(parents))[:limit]


def _other(token_id: int, distance: int) -> int:
    """Another token of the same vocabulary."""
    return token_id - distance if token_id >= distance else token_id + distance
