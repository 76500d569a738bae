"""Drafts by a head on the target's hidden states (EAGLE; `models.draft_head`): chains, for all sequences at once.

The engine shows what each step computed (`observe`): the hidden states of the tokens that a sequence has kept, and the
tokens behind them. They become rows of the head's own cache (`head_cache`); the last one guesses the next token, and
each guess is a row that is forgotten again. The head reads no prompt: a sequence is drafted for from its second step
on, wherever it was prefilled.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...core.random_bits import choice_seed
from ...models.draft_head import DraftHead
from ...protocol.messages import SampledToken
from ..interface import ScheduledSeq
from ..race import arrival_times, race_key
from ..sequence import Sequence
from .head_cache import HeadCache, Slot
from .head_step import HeadGuesses, HeadRows, HeadStep
from .interface import MAX_DRAFT_TOKENS, NOTHING, Draft

WINDOW = 256  # rows of a sequence that the head attends to
MAX_FRESH = WINDOW // 2  # rows that wait for the next draft
SURENESS = 8  # kinds of a place, by how sure the head was
_LEAST_TEMPERATURE = 1e-5
_MEASURED_SEQS = 8

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Fresh:
    """Rows that are not in the cache yet: features of tokens from position `first` on, and the token behind each."""

    first: int
    features: torch.Tensor
    token_ids: list[int]

    @property
    def end(self) -> int:
        return self.first + len(self.token_ids)


@dataclass(slots=True)
class _State:
    slot: Slot
    fresh: _Fresh | None = None


class HeadProposer:
    """Drafts with `head`, which computes by `step`; the target shows its steps to `observe`."""

    name = "eagle"
    num_kinds = MAX_DRAFT_TOKENS * SURENESS

    def __init__(self, head: DraftHead, step: HeadStep) -> None:
        layer = head.config.layer
        self._head, self._step = head, step
        self._cache = HeadCache(layer.num_kv_heads, layer.head_dim, WINDOW + MAX_DRAFT_TOKENS)
        self._states: dict[Sequence, _State] = {}
        self._vocab_size = layer.vocab_size
        self._draft_ids: Ints = head.draft_ids.numpy()
        self._guess_s = self._measure()

    @property
    def taps(self) -> tuple[int, ...]:
        """The hidden states that `observe` takes, as the engine calls them."""
        return self._head.config.target_layers

    # ---- what the control asks ----

    def first_guess(self, kind: int) -> float:
        return (kind % SURENESS + 0.5) / SURENESS

    def seconds(self, num_seqs: int, num_cached: int) -> float:
        """Of one further guess for each of `num_seqs`."""
        alone, each = self._guess_s
        return alone + each * (num_seqs - 1)

    def _measure(self) -> tuple[float, float]:
        """Seconds of a guess for one sequence, and for each further one."""
        one, many = (min(self._timed(count) for _ in range(3)) for count in (1, _MEASURED_SEQS))
        return one, max(many - one, 0.0) / (_MEASURED_SEQS - 1)

    def _timed(self, count: int) -> float:
        states = [_State(self._cache.take()) for _ in range(count)]
        hidden, zeros = torch.zeros(count, self._head.config.layer.hidden_size), np.zeros(count, np.int64)
        started = time.perf_counter()
        _sureness(self._guess(states, hidden, zeros, zeros, 0))
        taken = time.perf_counter() - started
        for state in states:
            self._cache.give_back(state.slot)
        return taken

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        """See `Proposer.propose`. A kind is a place in the draft with how sure the head was."""
        for seq in seqs:
            if seq not in self._states:
                self._states[seq] = _State(self._cache.take())
        drafts = [NOTHING] * len(seqs)
        places = [n for n, (seq, limit) in enumerate(zip(seqs, limits, strict=True)) if limit and self._is_ready(seq)]
        if places:
            chains = self._chains([seqs[n] for n in places], max(limits[n] for n in places))
            for place, draft in zip(places, chains, strict=True):
                limit = limits[place]
                drafts[place] = Draft(draft.token_ids[:limit], draft.kinds[:limit])
        return drafts

    def forget(self, seq: Sequence) -> None:
        state = self._states.pop(seq, None)
        if state is not None:
            self._cache.give_back(state.slot)

    # ---- what the engine shows ----

    def observe(self, batch: list[ScheduledSeq], drawn: list[tuple[SampledToken, ...]], features: torch.Tensor) -> None:
        """A step: features [sampled rows, taps, hidden_size] of `Batch.sampled_rows`, and what was drawn from them."""
        row = 0
        for entry, tokens in zip(batch, drawn, strict=True):
            state = self._states.get(entry.seq)
            if state is not None and entry.sample and not entry.seq.sample_choices:
                some = features[row : row + len(tokens)].flatten(1)
                _keep(state, _Fresh(entry.seq.num_tokens - 1, some, [token.token_id for token in tokens]))
            row += 1 + len(entry.draft) if entry.sample else 0

    def _is_ready(self, seq: Sequence) -> bool:
        fresh = self._states[seq].fresh
        return fresh is not None and fresh.end == seq.num_tokens - 1

    # ---- drafting ----

    def _chains(self, seqs: list[Sequence], count: int) -> list[Draft]:
        """A chain of `count` guesses for each."""
        states = [self._states[seq] for seq in seqs]
        guesses = self._read(states, count)
        positions = np.array([state.slot.end for state in states])
        token_ids, kinds = np.empty((2, len(seqs), count), np.int64)
        for place in range(count):
            self._draw(seqs, guesses, place)
            token_ids[:, place] = self._draft_ids[guesses.best]
            kinds[:, place] = place * SURENESS + _sureness(guesses)
            if place + 1 < count:
                guesses = self._guess(states, guesses.hidden, token_ids[:, place].copy(), positions + place, place)
        return [Draft(tuple(ids), tuple(some)) for ids, some in zip(token_ids.tolist(), kinds.tolist(), strict=True)]

    def _read(self, states: list[_State], count: int) -> HeadGuesses:
        """What is fresh goes into the cache, with room for `count` guesses behind it; and the first of these."""
        features: list[torch.Tensor] = []
        positions: list[int] = []
        token_ids: list[int] = []
        for state in states:
            fresh, slot = state.fresh, state.slot
            assert fresh is not None
            if slot.end != fresh.first:  # something lies between: the rows before it are of no use
                slot.rows = 0
            self._cache.make_room(slot, len(fresh.token_ids) + count)
            features.append(fresh.features)
            positions += range(fresh.first, fresh.end)
            token_ids += fresh.token_ids
        lengths = [len(state.fresh.token_ids) for state in states if state.fresh is not None]
        hidden = self._head.fuse(torch.cat(features).to(self._head.lm_head.dtype)).float()
        guesses = self._run(states, hidden, np.array(token_ids), np.array(positions), np.array([0, *lengths]), 0)
        for state, length in zip(states, lengths, strict=True):
            assert state.fresh is not None
            state.slot.rows += length
            state.slot.end, state.fresh = state.fresh.end, None
        return guesses

    def _guess(
        self, states: list[_State], hidden: torch.Tensor, token_ids: Ints, positions: Ints, behind: int
    ) -> HeadGuesses:
        """A row for each sequence, `behind` rows after those that are kept."""
        return self._run(states, hidden.contiguous(), token_ids, positions, np.array([0, *[1] * len(states)]), behind)

    def _run(
        self,
        states: list[_State],
        hidden: torch.Tensor,
        token_ids: Ints,
        positions: Ints,
        lengths: Ints,
        behind: int,
    ) -> HeadGuesses:
        slots = np.array([state.slot.index for state in states])
        num_kept = np.array([state.slot.rows + behind for state in states])
        return self._step(HeadRows(hidden, token_ids, positions, lengths.cumsum(), slots, num_kept), self._cache.pool)

    def _draw(self, seqs: list[Sequence], guesses: HeadGuesses, place: int) -> None:
        """Sequences that are sampled go on with what wins the race with their own key, as it does for the target."""
        for n, seq in enumerate(seqs):
            if not seq.params.is_greedy:
                guesses.best[n] = self._race(seq, guesses.logits[n], place)

    def _race(self, seq: Sequence, logits: npt.NDArray[np.float32], place: int) -> int:
        params = seq.params
        weights = np.exp((logits - logits.max()) / max(params.temperature, _LEAST_TEMPERATURE))
        key = race_key(choice_seed(params.seed, seq.choice), len(seq.output_ids) + place)
        return int(np.argmax(weights / arrival_times(key, self._vocab_size, self._draft_ids)))


def _keep(state: _State, fresh: _Fresh) -> None:
    """Remember what is new, behind what waits already."""
    held = state.fresh
    if held is not None and held.end == fresh.first:
        features = torch.cat((held.features, fresh.features))[-MAX_FRESH:]
        token_ids = (held.token_ids + fresh.token_ids)[-MAX_FRESH:]
        fresh = _Fresh(fresh.end - len(token_ids), features, token_ids)
    state.fresh = fresh


def _sureness(guesses: HeadGuesses) -> Ints:
    """For each sequence in which eighth of [0, 1] the probability of its guess lies."""
    own = np.take_along_axis(guesses.logits, guesses.best[:, None], axis=1)
    share = 1 / np.exp(guesses.logits - own).sum(axis=1)
    kinds: Ints = np.minimum((share * SURENESS).astype(np.int64), SURENESS - 1)
    return kinds
