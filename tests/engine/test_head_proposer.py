"""Drafting with a head: it sees the target's steps, its drafts are the chains of `models.draft_chain`, and they change
nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.core.random_bits import choice_seed
from penstock.decode_node.local import LocalRunner
from penstock.engine.interface import ScheduledSeq, StepCosts
from penstock.engine.race import arrival_times, race_key, winner
from penstock.engine.sequence import Sequence
from penstock.engine.speculation.build import Openers, build_speculation
from penstock.engine.speculation.control import Speculator
from penstock.engine.speculation.draft_head import HeadProposer
from penstock.engine.speculation.head_step import HeadGuesses, TorchHeadStep, make_head_step
from penstock.engine.speculation.interface import Draft, Proposer
from penstock.engine.speculation.open_head import head_matrix, open_head, open_shipped_head
from penstock.engine.torch_engine import TorchEngine, build_decoder
from penstock.models import shipped_heads
from penstock.models.draft_chain import DraftCache, draft_chain
from penstock.models.draft_file import save_draft_head
from penstock.models.draft_head import DraftHead
from penstock.protocol.messages import SampledToken, WorkerLoad
from penstock.protocol.sampling import SamplingParams
from penstock.testing.fake_engine import FakeEngine
from penstock.testing.sim_parking import SteppingClock
from penstock.testing.tiny_head import LAYOUTS, random_head
from penstock.testing.tiny_model import random_weights, tiny_config

TARGET = tiny_config(hidden_size=96)
PROMPT = list(range(20, 50))
GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
CHOICES = SamplingParams(max_tokens=12, temperature=1.0, seed=7, n=3, ignore_eos=True)
RULED = SamplingParams(
    max_tokens=40, temperature=0.8, seed=3, repetition_penalty=1.2, min_tokens=30, logit_bias={9: 4.0}, logprobs=1
)
COSTS = StepCosts(((1, 10e-3), (2, 10.2e-3), (4, 10.8e-3), (8, 12e-3), (128, 80e-3)), 0, 0)


def engine(grouped: bool = False) -> TorchEngine:
    decoder = build_decoder(TARGET, random_weights(TARGET).items(), torch.float32, grouped=grouped)
    return TorchEngine(decoder, model_name="tiny", identity="abc", num_blocks=200, block_size=4)


def head_for(target: TorchEngine, layout: str) -> DraftHead:
    matrix = head_matrix(target.decoder).index_select(0, torch.arange(TARGET.vocab_size))
    return random_head(layout, TARGET, target.decoder.weights.embedding, matrix)


class Watching(HeadProposer):
    """Keeps what it saw of a single sequence and what it drafted."""

    def __init__(self, head: DraftHead, target: TorchEngine) -> None:
        super().__init__(head, make_head_step(head, 400, lambda: 1))
        self.seen: list[tuple[int, torch.Tensor, int]] = []  # position, features, the token behind
        self.drafts: list[tuple[int, Draft]] = []  # how many rows were seen, and what was drafted from them
        target.show_steps(self.taps, self._see)

    def _see(self, batch, drawn, features) -> None:
        for entry, tokens in zip(batch, drawn, strict=True):
            for place, token in enumerate(() if entry.seq.sample_choices else tokens):
                self.seen.append((entry.seq.num_tokens - 1 + place, features[place].flatten(), token.token_id))
        self.observe(batch, drawn, features)

    def propose(self, seqs, limits) -> list[Draft]:
        drafts = super().propose(seqs, limits)
        self.drafts += [(len(self.seen), draft) for draft in drafts]
        return drafts


def run(
    target: TorchEngine, proposer: HeadProposer | None, params: SamplingParams
) -> tuple[dict[int, list[int]], WorkerLoad]:
    speculation = Speculator([proposer], 4, None) if proposer is not None else None
    runner = LocalRunner(target, SteppingClock(10e-3), 64, speculation)
    ids: dict[int, list[int]] = {}
    for item in runner.stream(PROMPT, params):
        ids.setdefault(item.choice, []).extend(token.token_id for token in item.tokens)
    if proposer is not None:
        assert not proposer._states
        assert proposer._cache.num_taken == 0
    return ids, runner.core.snapshot().load


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, RULED, CHOICES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_that_knows_nothing_changes_nothing(layout: str, params: SamplingParams) -> None:
    plain, _ = run(engine(), None, params)
    target = engine()
    drafted, load = run(target, Watching(head_for(target, layout), target), params)
    assert drafted == plain
    assert load.drafted_tokens > 30
    assert load.accepted_tokens < 0.3 * load.drafted_tokens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafts_are_the_chains_over_all_that_was_seen(layout: str) -> None:
    target = engine()
    head = head_for(target, layout)
    watching = Watching(head, target)
    watching._step = TorchHeadStep(head)
    run(target, watching, GREEDY)
    assert len(watching.drafts) > 20
    assert [draft for seen, draft in watching.drafts if not draft.token_ids] == [watching.drafts[0][1]]
    for seen, draft in watching.drafts[1:]:
        rows = watching.seen[:seen]
        cache = DraftCache(head, len(rows) + 8, rows[0][0])
        features, token_ids = torch.stack([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
        chain = draft_chain(head, cache, features, token_ids, len(draft.trunk()))
        assert list(draft.trunk().token_ids) == chain.token_ids


class Perfect:
    """In place of a head's step: the likeliest is what the target says next, whatever the rows."""

    def __init__(self, head: DraftHead) -> None:
        self._step = TorchHeadStep(head)
        self.answer: list[int] = []
        self.ids = head.draft_ids.tolist()

    def __call__(self, rows, pool):
        guesses = self._step(rows, pool)
        for n, end in enumerate(rows.cu_seqlens[1:]):
            place = rows.positions[end - 1] + 2 - len(PROMPT)
            if place < len(self.answer):
                guesses.logits[n, self.ids.index(self.answer[place])] = 99
        guesses.best[:] = guesses.logits.argmax(axis=1)
        return guesses


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_head_that_knows_all_is_accepted_from_the_second_step_on(params: SamplingParams) -> None:
    plain, _ = run(engine(), None, params)
    target = engine()
    watching = Watching(head_for(target, "eagle"), target)
    watching._step = perfect = Perfect(head_for(target, "eagle"))
    perfect.answer = plain[0]
    drafted, load = run(target, watching, params)
    assert drafted == plain
    assert load.accepted_tokens == load.drafted_tokens
    assert load.steps <= 2 + len(plain[0]) / 5 + 1


class Second(Perfect):
    """As `Perfect`, but holds another token likeliest: what the target says comes in second."""

    def __call__(self, rows, pool):
        guesses = super().__call__(rows, pool)
        for logits in guesses.logits:
            right = int(logits.argmax())
            logits[right] = 50
            logits[right - 1 if right else 1] = 50.4
        guesses.best[:] = guesses.logits.argmax(axis=1)
        return guesses


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, RULED])
def test_runners_up_are_drafted_and_accepted(params: SamplingParams) -> None:
    plain, _ = run(engine(), None, params)
    target = engine()
    watching = Watching(head_for(target, "eagle"), target)
    watching._step = second = Second(head_for(target, "eagle"))
    second.answer = plain[0]
    drafted, load = run(target, watching, params)
    assert drafted == plain
    assert all(draft.parents for _, draft in watching.drafts[1:])
    if params.temperature == 0:  # sampled ones draft whichever of the two arrives first
        assert load.accepted_at[1:] == (0, 0, 0)
        assert load.accepted_at[0] >= 0.9 * load.drafts
    assert load.accepted_tokens > 15
    positions = [position for position, _, _ in watching.seen]
    assert positions == list(range(positions[0], positions[0] + len(positions)))  # of paths, and nothing beside them


def test_sampled_runners_up_come_in_next_in_the_sequences_own_race() -> None:
    target = engine()
    head = head_for(target, "ours")
    proposer = HeadProposer(head, TorchHeadStep(head))
    seq = a_sequence(SAMPLED, [1, 2, 3])
    logits = np.random.default_rng(5).normal(size=(1, 100)).astype(np.float32) * 3
    for place in range(5):
        guesses = HeadGuesses(torch.zeros(1, 1), logits.copy(), logits.argmax(axis=1))
        entries = proposer._ranked(seq, guesses, 0, place)
        times = arrival_times(race_key(choice_seed(7, 2), 3 + place), TARGET.vocab_size, head.draft_ids.numpy())
        order = np.argsort(-np.exp(logits[0] - logits.max()) / times)
        assert entries == order[:3].tolist()
        assert (guesses.logits == logits).all()


def a_sequence(params: SamplingParams, output: list[int]) -> Sequence:
    return Sequence(("r0", 0), 2, PROMPT, params, b"", 0.0, 9.0, output_ids=output)  # type: ignore[arg-type]


def test_a_sampled_draft_is_the_winner_of_the_sequences_own_race() -> None:
    target = engine()
    head = head_for(target, "ours")
    proposer = HeadProposer(head, TorchHeadStep(head))
    seq = a_sequence(SAMPLED, [1, 2, 3])
    logits = np.random.default_rng(5).normal(size=100).astype(np.float32) * 3
    weights = np.zeros(TARGET.vocab_size, np.float32)
    weights[head.draft_ids.numpy()] = np.exp(logits - logits.max())
    wins = [winner(weights, race_key(choice_seed(7, 2), 3 + place)) for place in range(30)]
    assert [int(head.draft_ids[proposer._race(seq, logits, place).argmax()]) for place in range(30)] == wins
    assert len(set(wins)) > 3


def step_of(proposer: HeadProposer, seq: Sequence, token_id: int) -> None:
    features = torch.full((1, len(proposer.taps), TARGET.hidden_size), 0.1 * token_id)
    seq.num_computed_tokens = seq.num_tokens - 1
    proposer.observe([ScheduledSeq(seq, 1)], [(SampledToken(token_id),)], features)
    seq.output_ids.append(token_id)


def test_rows_behind_a_gap_begin_anew() -> None:
    head = head_for(engine(), "ours")
    proposer = HeadProposer(head, TorchHeadStep(head))
    seq = a_sequence(GREEDY, [1])
    assert proposer.propose([seq], [3])[0].token_ids == ()
    for token_id in (4, 5):
        step_of(proposer, seq, token_id)
    assert len(proposer.propose([seq], [3])[0].trunk()) == 3
    slot = proposer._states[seq].slot
    assert slot.rows == 2
    seq.output_ids.append(6)  # computed where nobody showed it
    assert proposer.propose([seq], [3])[0].token_ids == ()
    step_of(proposer, seq, 7)
    assert len(proposer.propose([seq], [3])[0].trunk()) == 3
    assert slot.rows == 1


def test_long_sequences_keep_their_newest_rows() -> None:
    head = head_for(engine(), "ours")
    proposer = HeadProposer(head, TorchHeadStep(head))
    seq = a_sequence(GREEDY, [1])
    proposer.propose([seq], [1])
    for token_id in range(700):
        step_of(proposer, seq, token_id % 300)
        if token_id % 5 == 0 or token_id > 400:
            assert len(proposer.propose([seq], [3])[0].trunk()) == 3
    slot = proposer._states[seq].slot
    assert 100 <= slot.rows <= proposer._cache.capacity - 3
    assert slot.end == seq.num_tokens - 1
    proposer.forget(seq)
    assert proposer._cache.num_taken == 0


def test_a_guess_costs_more_for_more_sequences() -> None:
    head = head_for(engine(), "ours")
    proposer = HeadProposer(head, TorchHeadStep(head))
    assert 0 < proposer.seconds(1, 0) <= proposer.seconds(8, 0)


@pytest.mark.parametrize("grouped", [False, True])
def test_open_head_reads_the_file_and_sees_the_engines_steps(tmp_path: Path, grouped: bool) -> None:
    target = engine(grouped)
    path = tmp_path / "head.safetensors"
    save_draft_head(head_for(target, "ours"), path, {"target_identity": "abc"}, dtype=torch.float32, with_lm_head=False)
    plain, _ = run(engine(grouped), None, GREEDY)
    drafted, load = run(target, open_head(target, path), GREEDY)
    assert drafted == plain
    assert load.drafted_tokens > 30


def test_the_shipped_head_is_the_one_for_this_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_heads.shipped_head, "__defaults__", (tmp_path,))
    target = engine()
    assert open_shipped_head(target) is None
    for name, identity in (("a", "other"), ("b", "abc")):
        path = tmp_path / f"{name}.safetensors"
        save_draft_head(head_for(target, "ours"), path, {"target_identity": identity}, with_lm_head=False)
    assert shipped_heads.shipped_head("abc", tmp_path) == tmp_path / "b.safetensors"
    assert isinstance(open_shipped_head(target), HeadProposer)


def test_build_opens_heads_by_their_names() -> None:
    opened: list[str | None] = []
    proposer = HeadProposer(head_for(engine(), "ours"), TorchHeadStep(head_for(engine(), "ours")))

    def open_one(name: str | None) -> Proposer | None:
        opened.append(name)
        return proposer

    spec = replace(FakeEngine().spec, step_costs=COSTS)
    for method in ("eagle", "eagle:some/where:else", "auto"):
        assert isinstance(build_speculation(method, 4, spec, Openers(head=open_one)), Speculator)
    assert opened == [None, "some/where:else", None]
    assert isinstance(build_speculation("auto", 4, spec, Openers(head=lambda _: None)), Speculator)
    with pytest.raises(ConfigError, match=r"eagle: no draft head comes with the project for this model"):
        build_speculation("eagle", 4, spec, Openers(head=lambda _: None))
