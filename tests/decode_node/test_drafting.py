"""Drafts in the decode role: same answers, fewer steps, no block that anything else waits for."""

from __future__ import annotations

import pytest

from penstock.decode_node.local import LocalRunner
from penstock.engine.speculation.control import Speculator
from penstock.protocol.messages import Tokens
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine, expected_run, expected_tokens
from penstock.testing.sim_drafts import SeededProposer

PROMPT = [5, 6, 7, 8, 9, 10, 11]
FREE = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0)


class Run:
    """Everything that one request gave."""

    def __init__(
        self,
        params: SamplingParams,
        hit_rate: float | None,
        num_blocks: int = 64,
        max_tokens: int = 4,
        seed: int = 0,
        trees: float = 0.5,
    ) -> None:
        self.proposer = SeededProposer(hit_rate or 0.0, seed, trees)
        self.speculator = Speculator([self.proposer], max_tokens, None) if hit_rate is not None else None
        runner = LocalRunner(FakeEngine(num_blocks), FakeClock(), 16, self.speculator)
        self.items: dict[int, list[Tokens]] = {choice: [] for choice in range(params.n)}
        for item in runner.stream(PROMPT, params):
            assert item.index == len(self.ids(item.choice))
            self.items[item.choice].append(item)
            runner.core.check_invariants()
        assert runner.core.pool.num_free_blocks == num_blocks
        assert not self.proposer.known
        self.load = runner.core.snapshot().load

    def ids(self, choice: int = 0) -> list[int]:
        return [token.token_id for item in self.items[choice] for token in item.tokens]

    @property
    def reason(self) -> str | None:
        return self.items[0][-1].finish_reason


@pytest.mark.parametrize("hit_rate", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "params",
    [
        FREE,
        SamplingParams(max_tokens=24, seed=11),
        SamplingParams(max_tokens=17, seed=4, repetition_penalty=1.3, logit_bias={5: 3.0}, min_tokens=9),
        SamplingParams(max_tokens=1, temperature=0),
        SamplingParams(max_tokens=2, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=12, seed=3, logprobs=2),
    ],
)
def test_answers_are_those_without_drafts(params: SamplingParams, hit_rate: float) -> None:
    for seed in range(8):
        run = Run(params, hit_rate, seed=seed, max_tokens=4 if seed % 2 else 9, trees=seed / 7)
        assert (run.ids(), run.reason) == expected_tokens(PROMPT, params)
    if params.logprobs is not None:
        tokens, _ = expected_run(PROMPT, params)
        assert [token for item in run.items[0] for token in item.tokens] == tokens


def test_right_drafts_save_steps_and_are_counted() -> None:
    run, plain = Run(FREE, 1.0, trees=0), Run(FREE, None)
    assert run.ids() == plain.ids()
    assert run.load.steps < plain.load.steps - run.load.accepted_tokens / 2
    assert run.load.accepted_tokens == run.load.drafted_tokens > 0
    assert sum(run.load.accepted_at) == run.load.accepted_tokens
    assert sum(item.accepted for item in run.items[0]) == run.load.accepted_tokens
    assert sum(len(item.tokens) for item in run.items[0]) == FREE.max_tokens
    assert (plain.load.drafts, plain.load.drafted_tokens) == (0, 0)


def test_paths_of_trees_save_steps_and_are_counted_by_place() -> None:
    run, plain = Run(FREE, 1.0, max_tokens=8, trees=1), Run(FREE, None)
    assert run.ids() == plain.ids()
    assert run.load.drafted_tokens > run.load.accepted_tokens > 4
    assert run.load.steps <= plain.load.steps - run.load.accepted_tokens
    assert run.load.accepted_at[0] >= run.load.accepted_at[1] > 0
    assert sum(run.load.accepted_at) == run.load.accepted_tokens == sum(item.accepted for item in run.items[0])


def test_wrong_drafts_are_refused_and_counted() -> None:
    run = Run(FREE, 0.0)
    assert run.load.drafted_tokens > run.load.accepted_tokens == 0
    assert all(len(item.tokens) == 1 for item in run.items[0])


def test_a_stop_token_within_a_right_draft_ends_the_answer_there() -> None:
    full = expected_tokens(PROMPT, FREE)[0]
    for place in range(1, 9):
        params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0, stop_token_ids=(full[place],))
        for seed in range(4):
            run = Run(params, 1.0, seed=seed, max_tokens=8)
            assert (run.ids(), run.reason) == expected_tokens(PROMPT, params)


@pytest.mark.parametrize("hit_rate", [0.0, 0.6, 1.0])
def test_several_choices_in_a_tiny_pool_agree_and_drafts_preempt_nobody(hit_rate: float) -> None:
    params = SamplingParams(max_tokens=12, n=3, seed=3, ignore_eos=True)
    for num_blocks in (5, 6, 7, 9):
        run, plain = Run(params, hit_rate, num_blocks), Run(params, None, num_blocks)
        for choice in range(3):
            assert run.ids(choice) == expected_tokens(PROMPT, params, choice)[0]
        assert run.load.preemptions <= plain.load.preemptions
