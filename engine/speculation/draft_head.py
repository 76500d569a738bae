"""Drafts by a head on the target's hidden states (EAGLE; `models.draft_head`): combs, for all sequences at once.

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
from . import comb
from .comb import Comb, Floats
from .head_cache import HeadCache, Slot
from .head_step import HeadGuesses, HeadRows, HeadStep
from .interface import MAX_DRAFT_TOKENS, NOTHING, Draft

WINDOW = 256  # rows of a sequence that the head attends to
MAX_FRESH = WINDOW // 2  # rows that wait for the next draft
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
    num_kinds = comb.NUM_KINDS

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
        return comb.first_guess(kind)

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
        guesses = self._guess(states, hidden, zeros, zeros, 0)
        best = zip(guesses.logits, guesses.best.tolist(), strict=True)
        comb.shares_of(guesses.logits, [comb.ranked(logits, entry, comb.RUNNERS_UP) for logits, entry in best])
        taken = time.perf_counter() - started
        for state in states:
            self._cache.give_back(state.slot)
        return taken

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        """See `Proposer.propose`. Kinds are those of `comb`."""
        for seq in seqs:
            if seq not in self._states:
                self._states[seq] = _State(self._cache.take())
        drafts = [NOTHING] * len(seqs)
        places = [n for n, (seq, limit) in enumerate(zip(seqs, limits, strict=True)) if limit and self._is_ready(seq)]
        if places:
            combs = self._combs([seqs[n] for n in places], max(limits[n] for n in places))
            for place, grown in zip(places, combs, strict=True):
                drafts[place] = grown.draft(limits[place])
        return drafts

    def forget(self, seq: Sequence) -> None:
        state = self._states.pop(seq, None)
        if state is not None:
            self._cache.give_back(state.slot)

    # ---- what the engine shows ----

    def observe(self, batch: list[ScheduledSeq], drawn: list[tuple[SampledToken, ...]], features: torch.Tensor) -> None:
        """A step: what was drawn, and features [rows, taps, hidden_size] of the rows it was drawn from: one for each
        entry that samples, and with a draft one for each of its tokens.
        """
        row = 0
        for entry, tokens in zip(batch, drawn, strict=True):
            state = self._states.get(entry.seq)
            if state is not None and entry.sample and not entry.seq.sample_choices:
                some = features[row : row + len(tokens)].flatten(1)
                _keep(state, _Fresh(entry.seq.num_tokens - 1, some, [token.token_id for token in tokens]))
            row += len(tokens) if entry.draft else int(entry.sample)

    def _is_ready(self, seq: Sequence) -> bool:
        fresh = self._states[seq].fresh
        return fresh is not None and fresh.end == seq.num_tokens - 1

    # ---- drafting ----

    def _combs(self, seqs: list[Sequence], count: int) -> list[Comb]:
        """A comb of `count` places for each."""
        states, combs = [self._states[seq] for seq in seqs], [Comb() for _ in seqs]
        guesses = self._read(states, count)
        positions = np.array([state.slot.end for state in states])
        for place in range(count):
            entries = [self._ranked(seq, guesses, n, place) for n, seq in enumerate(seqs)]
            token_ids, shares = self._draft_ids[np.array(entries)], comb.shares_of(guesses.logits, entries)
            for grown, some, their_shares in zip(combs, token_ids.tolist(), shares, strict=True):
                grown.grow(some, their_shares)
            if place + 1 < count:
                guesses = self._guess(states, guesses.hidden, token_ids[:, 0].copy(), positions + place, place)
        return combs

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

    def _ranked(self, seq: Sequence, guesses: HeadGuesses, n: int, place: int) -> list[int]:
        """The likeliest entries of row `n`. A sequence that is sampled goes on with what wins the race with its own
        key, as it does for the target, and with those that come in next.
        """
        logits, best = guesses.logits[n], int(guesses.best[n])
        if not seq.params.is_greedy:
            logits = self._race(seq, logits, place)
            best = int(logits.argmax())
        return comb.ranked(logits, best, comb.RUNNERS_UP)

    def _race(self, seq: Sequence, logits: Floats, place: int) -> Floats:
        """How early each entry arrives."""
        params = seq.params
        weights = np.exp((logits - logits.max()) / max(params.temperature, _LEAST_TEMPERATURE))
        key = race_key(choice_seed(params.seed, seq.choice), len(seq.output_ids) + place)
        pace: Floats = weights / arrival_times(key, self._vocab_size, self._draft_ids)
        return pace


def _keep(state: _State, fresh: _Fresh) -> None:
    """Remember what is new, behind what waits already."""
    held = state.fresh
    if held is not None and held.end == fresh.first:
        features = torch.cat((held.features, fresh.features))[-MAX_FRESH:]
        token_ids = (held.token_ids + fresh.token_ids)[-MAX_FRESH:]
        fresh = _Fresh(fresh.end - len(token_ids), features, token_ids)
    state.fresh = fresh
