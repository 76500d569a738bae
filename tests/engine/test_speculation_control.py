"""How much is drafted: all that is right, nothing that does not pay."""

from __future__ import annotations

import random
from collections.abc import Sequence as Sequences

import pytest

from penstock.core.errors import ConfigError
from penstock.core.ids import AttemptKey
from penstock.engine.interface import EngineSpec, ScheduledSeq, StepCosts
from penstock.engine.sequence import Sequence
from penstock.engine.speculation.acceptance import Correction
from penstock.engine.speculation.build import build_speculation
from penstock.engine.speculation.control import PROBE_EVERY, Speculator
from penstock.engine.speculation.interface import NOTHING, Draft
from penstock.engine.speculation.pauses import Pauses
from penstock.engine.speculation.step_cost import StepCost
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine
from penstock.testing.sim_parking import SteppingClock

# Measured of a step on two cores: further tokens are cheap up to eight, then each costs as much as the next.
COSTS = StepCosts(((1, 3.5e-3), (2, 3.6e-3), (4, 4.5e-3), (8, 5.5e-3), (16, 9.7e-3), (32, 18e-3), (128, 65e-3)), 0, 0)


class Coin:
    """Proposes tokens that are right with a probability of their own, whatever the sequence."""

    name, num_kinds = "coin", 1

    def __init__(self, guess: float = 0.5) -> None:
        self.guess = guess

    def seconds(self, num_seqs: int, num_cached: int) -> float:
        return 0.0

    def first_guess(self, kind: int) -> float:
        return self.guess

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        return [Draft((7,) * limit, (0,) * limit) for limit in limits]

    def forget(self, seq: Sequence) -> None:
        pass


def sequences(count: int) -> list[Sequence]:
    params = SamplingParams(max_tokens=1000)
    return [Sequence(AttemptKey(str(n), 0), 0, [1, 2, 3], params, b"", 0.0, 1.0, [4]) for n in range(count)]


def run(speculator: Speculator, seqs: list[Sequence], hit_rate: float, steps: int, seed: int = 0) -> list[int]:
    """Tokens drafted in each step, of drafts whose tokens are right with this probability."""
    rng, drafted = random.Random(seed), []
    for _ in range(steps):
        drafts = speculator.draft(seqs, [8] * len(seqs), 512)
        drafted.append(sum(map(len, drafts)))
        for seq, draft in zip(seqs, drafts, strict=True):
            accepted = next((n for n in range(len(draft)) if rng.random() >= hit_rate), len(draft))
            if draft:
                speculator.verified(seq, len(draft), tuple(range(accepted)))
    return drafted


def test_a_perfect_draft_is_taken_whole() -> None:
    drafted = run(Speculator([Coin()], 8, StepCost(COSTS)), sequences(1), 1.0, 60)
    assert drafted[-1] == 8


def test_a_random_draft_is_soon_switched_off() -> None:
    speculator = Speculator([Coin(0.9)], 8, StepCost(COSTS))
    run(speculator, sequences(1), 0.02, 30)
    later = run(speculator, sequences(1), 0.02, 1000)
    assert sum(later[-500:]) <= 500 / PROBE_EVERY + 1
    plain = 1000 * COSTS.curve[0][1]
    cost = sum(StepCost(COSTS).seconds(1 + number, 0, 0) for number in later)
    assert cost / plain < 1.03


def test_a_draft_that_was_off_comes_back_when_it_is_right() -> None:
    speculator, seqs = Speculator([Coin()], 8, StepCost(COSTS)), sequences(1)
    run(speculator, seqs, 0.0, 100)
    assert run(speculator, seqs, 1.0, PROBE_EVERY * 40)[-1] == 8


def test_a_batch_that_fills_the_machine_drafts_less() -> None:
    lengths = []
    for count in (1, 8, 32):
        drafted = run(Speculator([Coin()], 8, StepCost(COSTS)), sequences(count), 0.6, 120)
        lengths.append(sum(drafted[-40:]) / 40 / count)
    assert lengths[0] > lengths[1] >= lengths[2]
    assert lengths[0] > 2


def test_the_lucky_sequence_drafts_and_its_unlucky_neighbour_does_not() -> None:
    speculator, seqs = Speculator([Coin()], 8, StepCost(COSTS)), sequences(2)
    for _ in range(80):
        drafts = speculator.draft(seqs, [8, 8], 512)
        for seq, draft, is_lucky in zip(seqs, drafts, (True, False), strict=True):
            if draft:
                speculator.verified(seq, len(draft), tuple(range(len(draft) if is_lucky else 0)))
    lucky, unlucky = speculator.draft(seqs, [8, 8], 512)
    assert len(lucky) == 8
    assert len(unlucky) <= 1


def test_limits_and_room_hold() -> None:
    speculator, seqs = Speculator([Coin(0.99)], 5, None), sequences(3)
    assert list(map(len, speculator.draft(seqs, [9, 2, 0], 512))) == [5, 2, 0]
    assert sum(map(len, speculator.draft(seqs, [9, 9, 9], 4))) <= 4
    assert speculator.draft(seqs, [9, 9, 9], 0) == [NOTHING] * 3
    assert speculator.draft([], [], 9) == []


def test_counts_are_by_place() -> None:
    speculator, seqs = Speculator([Coin()], 3, None), sequences(2)
    for accepted in (3, 1):
        drafts = speculator.draft(seqs, [3, 3], 512)
        for seq, draft in zip(seqs, drafts, strict=True):
            speculator.verified(seq, len(draft), tuple(range(accepted)))
    counts = speculator.counts
    assert (counts.drafts, counts.drafted, counts.accepted, counts.positions) == (4, 12, 8, (4, 2, 2))


def test_forget_leaves_nothing() -> None:
    speculator, seqs = Speculator([Coin()], 3, None), sequences(2)
    speculator.draft(seqs, [3, 3], 512)
    for seq in seqs:
        speculator.forget(seq)
    assert not speculator._corrections
    assert not speculator._drafted


def test_step_cost_learns_what_steps_take() -> None:
    cost = StepCost(COSTS)
    for _ in range(200):
        cost.note(1, 0, 0, 7e-3)  # all takes twice as long
        cost.note(8, 0, 0, 22e-3)  # and eight tokens twice as long again
    assert cost.seconds(1, 0, 0) == pytest.approx(7e-3, rel=0.25)
    assert cost.seconds(8, 0, 0) / cost.seconds(1, 0, 0) > 1.5 * 5.5 / 3.5


def test_step_cost_between_and_beyond_its_points() -> None:
    cost = StepCost(StepCosts(((1, 1.0), (3, 2.0)), 0.1, 0.01))
    assert [cost.seconds(n, 0, 0) for n in (1, 2, 3, 6)] == [1.0, 1.5, 2.0, 4.0]
    assert cost.seconds(1, 10, 20) == pytest.approx(1 + 1 + 0.2)


def test_steps_that_prefill_teach_nothing() -> None:
    cost = StepCost(COSTS)
    speculator, (seq,) = Speculator([Coin()], 3, cost), sequences(1)
    before = cost.seconds(1, 4, 0)
    speculator.note_step([ScheduledSeq(seq, 2)], 5.0)
    assert cost.seconds(1, 4, 0) == before
    speculator.note_step([ScheduledSeq(seq, 1)], 5.0)
    assert cost.seconds(1, 4, 0) > before


class Fading(Coin):
    """Right at first; then it finds nothing."""

    def __init__(self) -> None:
        super().__init__(0.95)
        self.asked, self.is_over = 0, False

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        self.asked += 1
        return [NOTHING for _ in seqs] if self.is_over else super().propose(seqs, limits)


def test_looking_for_drafts_is_paused_while_nothing_is_found() -> None:
    proposer, seqs = Fading(), sequences(1)
    speculator = Speculator([proposer], 8, StepCost(COSTS), SteppingClock(0.1e-3))
    run(speculator, seqs, 1.0, 20)
    assert proposer.asked == 20
    proposer.is_over = True
    run(speculator, seqs, 1.0, 200)
    assert proposer.asked < 20 + 100
    proposer.is_over = False
    assert run(speculator, seqs, 1.0, 40)[-5:] == [8] * 5


class Modest(Coin):
    """Says that a token takes next to nothing, and takes `token_s` of the clock."""

    def __init__(self, clock: FakeClock, token_s: float) -> None:
        super().__init__(0.6)
        self._clock, self._token_s = clock, token_s

    def seconds(self, num_seqs: int, num_cached: int) -> float:
        return 0.1e-3

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        self._clock.advance(self._token_s * max(limits))
        return super().propose(seqs, limits)


@pytest.mark.parametrize(("token_s", "least", "most"), [(0.1e-3, 1.0, 8.0), (4e-3, 0.0, 0.3)])
def test_what_drafts_take_to_make_is_learned(token_s: float, least: float, most: float) -> None:
    clock = FakeClock()
    speculator = Speculator([Modest(clock, token_s)], 8, StepCost(COSTS), clock)
    drafted = run(speculator, sequences(1), 0.6, 300)
    assert least <= sum(drafted[-100:]) / 100 <= most


def test_one_bad_look_does_not_end_looking_that_pays() -> None:
    """Three looks in ten find something, which saves more than all ten take."""
    clock, looks = FakeClock(), 0
    pauses = Pauses(clock)
    rng = random.Random(1)
    for _ in range(1000):
        if pauses.begin():
            looks += 1
            clock.advance(0.1e-3)
            pauses.end(1.5e-3 if rng.random() < 0.3 else 0.0, 0.0)
    assert looks > 700


def test_build_knows_its_methods() -> None:
    spec: EngineSpec = FakeEngine().spec
    assert build_speculation("off", 8, spec) is None
    assert build_speculation("auto", 8, spec) is None  # nothing measured
    assert isinstance(build_speculation("ngram", 8, spec), Speculator)
    with pytest.raises(ConfigError, match=r"speculation.method: 'eagel' is not one of"):
        build_speculation("eagel", 8, spec)


# ---- trees ----


class Trees(Coin):
    """Proposes one tree for every sequence, with what it guesses of each token."""

    def __init__(self, parents: tuple[int, ...], chances: tuple[float, ...]) -> None:
        super().__init__()
        self.tree, self.chances, self.num_kinds = parents, chances, len(chances)

    def first_guess(self, kind: int) -> float:
        return self.chances[kind]

    def propose(self, seqs: Sequences[Sequence], limits: Sequences[int]) -> list[Draft]:
        count = len(self.chances)
        return [Draft(tuple(range(100, 100 + count)), tuple(range(count)), self.tree) for _ in limits]


# Chances to be reached: 0.6, 0.3, 0.15 along the chain; beside them 0.3, 0.05 and, behind the first, 0.24.
COMB = (-1, 0, 1, -1, -1, 0)
CHANCES = (0.6, 0.5, 0.5, 0.3, 0.05, 0.4)


def linear(each: float) -> StepCost:
    """A step of n tokens takes 1 + (n - 1) * each."""
    return StepCost(StepCosts(((1, 1.0), (101, 1.0 + 100 * each)), 0, 0))


@pytest.mark.parametrize(
    ("each", "tokens", "parents"),
    [
        # One token: 1.6 / (1 + each) beats 1 by the margin; two: 1.9 / (1 + 2 · each) beats 1.6 / (1 + each) if
        # each < 0.3 / 1.3; three: 2.2 / (1 + 3 · each) beats 1.9 / (1 + 2 · each) if each < 0.3 / 1.3 likewise.
        (0.7, (), ()),
        (0.5, (100,), ()),
        (0.2, (100, 101, 103), (-1, 0, -1)),
        # Four, with 0.24: 2.44 / (1 + 4 · each) beats 2.2 / (1 + 3 · each) if each < 0.24 / 1.48 = 0.162.
        (0.165, (100, 101, 103), (-1, 0, -1)),
        (0.16, (100, 101, 103, 105), (-1, 0, -1, 0)),
        # Five, with 0.15: 2.59 / (1 + 5 · each) beats 2.44 / (1 + 4 · each) if each < 0.15 / 1.84 = 0.0815.
        (0.08, (100, 101, 102, 103, 105), (-1, 0, 1, -1, 0)),
        # Six, with 0.05: 2.64 / (1 + 6 · each) beats 2.59 / (1 + 5 · each) if each < 0.05 / 2.34 = 0.0213.
        (0.01, (100, 101, 102, 103, 104, 105), COMB),
    ],
)
def test_the_likeliest_tokens_of_a_tree_are_taken(
    each: float, tokens: tuple[int, ...], parents: tuple[int, ...]
) -> None:
    speculator = Speculator([Trees(COMB, CHANCES)], 8, linear(each))
    (draft,) = speculator.draft(sequences(1), [8], 512)
    assert (draft.token_ids, draft.parents) == (tokens, parents)


def test_a_tree_has_no_more_tokens_than_a_draft_may() -> None:
    seqs = sequences(2)
    some = Speculator([Trees(COMB, CHANCES)], 4, None).draft(seqs, [9, 2], 512)
    assert [draft.token_ids for draft in some] == [(100, 101, 103, 105), (100, 101)]
    assert sum(map(len, Speculator([Trees(COMB, CHANCES)], 4, None).draft(seqs, [9, 9], 5))) == 5
    bush = Trees((-1,) * 30, (0.5,) * 30)
    assert len(Speculator([bush], 40, None).draft(sequences(1), [40], 512)[0]) == 15  # with the last token 16 rows


def test_what_is_hardly_ever_reached_is_not_looked_at() -> None:
    """However cheap it is; children go with their parents."""
    unlikely = Trees((-1, -1, 1, 0), (0.6, 0.02, 0.9, 0.5))
    (draft,) = Speculator([unlikely], 8, linear(0.0)).draft(sequences(1), [8], 512)
    assert (draft.token_ids, draft.parents) == ((100, 101, 102, 103), (-1, -1, 1, 0))  # a guess is 0.05 at least
    unlikely = Trees((-1, 0, 1, 2, 0), (0.3, 0.3, 0.2, 0.9, 0.5))
    (draft,) = Speculator([unlikely], 8, linear(0.0)).draft(sequences(1), [8], 512)
    assert (draft.token_ids, draft.parents) == ((100, 101, 104), (-1, 0, 0))


def test_an_engine_that_takes_chains_alone_gets_the_trunk() -> None:
    (draft,) = Speculator([Trees(COMB, CHANCES)], 8, None, takes_trees=False).draft(sequences(1), [8], 512)
    assert (draft.token_ids, draft.parents) == ((100, 101, 102), ())


def test_an_accepted_leaf_is_counted_at_its_place() -> None:
    speculator, (seq,) = Speculator([Trees(COMB, CHANCES)], 6, None), sequences(1)
    for path in ((0, 5), (3,), ()):
        assert len(speculator.draft([seq], [6], 512)[0]) == 6
        speculator.verified(seq, 6, path)
    counts = speculator.counts
    assert (counts.drafts, counts.drafted, counts.accepted) == (3, 18, 3)
    assert counts.positions == (2, 1, 0, 0, 0, 0)


def test_what_was_looked_at_is_learned_and_nothing_else() -> None:
    speculator, (seq,) = Speculator([Trees(COMB, CHANCES)], 6, None), sequences(1)
    for _ in range(200):
        speculator.draft([seq], [6], 512)
        speculator.verified(seq, 6, (3,))  # always the first leaf: what stands behind token 0 is never reached
    acceptance = speculator._acceptance[0]
    fresh = Correction()
    rates = [acceptance.chance(kind, fresh) for kind in range(6)]
    assert rates[0] < 0.02 < 0.98 < rates[3]
    assert rates[4] < 0.02
    assert [rates[kind] for kind in (1, 2, 5)] == pytest.approx([CHANCES[kind] for kind in (1, 2, 5)])
    assert acceptance.mean < 0.01  # of first children
    corrections = speculator._corrections[seq][0]
    assert corrections.first.shift < 0
    (draft,) = Speculator.draft(speculator, [seq], [1], 512)
    assert draft.token_ids == (103,)
