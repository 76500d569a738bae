"""A draft model beside its target: the model itself, one with other weights, and what holds for both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.decode_node.local import LocalRunner
from penstock.engine.interface import StepCosts
from penstock.engine.speculation.build import Openers, build_speculation
from penstock.engine.speculation.control import Speculator
from penstock.engine.speculation.draft_model import MAX_NEW_TOKENS, ModelProposer
from penstock.engine.speculation.step_cost import StepCost
from penstock.engine.torch_engine import TorchEngine, build_decoder
from penstock.models.decoder import Decoder
from penstock.protocol.messages import WorkerLoad
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine, expected_tokens
from penstock.testing.sim_parking import SteppingClock
from penstock.testing.tiny_model import random_weights, tiny_config

PROMPT = list(range(20, 50))
GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
RULED = SamplingParams(
    max_tokens=40, temperature=0.8, seed=3, repetition_penalty=1.2, min_tokens=30, logit_bias={9: 4.0}, logprobs=1
)
# Drafting a token takes a fifth of a step.
TARGET_COSTS = StepCosts(((1, 10e-3), (2, 10.2e-3), (4, 10.8e-3), (8, 12e-3), (128, 80e-3)), 0, 0)
DRAFT_COSTS = StepCosts(((1, 2e-3), (128, 16e-3)), 0, 0)


def decoder(seed: int) -> Decoder:
    config = tiny_config()
    return build_decoder(config, random_weights(config, seed).items(), torch.float32)


@pytest.fixture(scope="module")
def target() -> Decoder:
    return decoder(0)


def engine(of: Decoder, num_blocks: int = 200) -> TorchEngine:
    return TorchEngine(of, model_name="tiny", identity="abc", num_blocks=num_blocks, block_size=4)


def run(
    target: TorchEngine,
    draft: TorchEngine | None,
    params: SamplingParams,
    cost: StepCost | None = None,
    *,
    takes_trees: bool = False,
) -> tuple[list[int], WorkerLoad]:
    proposer = ModelProposer(draft, target.spec) if draft is not None else None
    speculation = Speculator([proposer], 4, cost, takes_trees=takes_trees) if proposer is not None else None
    runner = LocalRunner(target, SteppingClock(10e-3), 64, speculation)
    ids = [token.token_id for item in runner.stream(PROMPT, params) for token in item.tokens]
    if proposer is not None:
        assert not proposer._shadows
        assert proposer._pool.num_free_blocks == proposer._pool.num_blocks
        proposer._pool.check_invariants([])
    return ids, runner.core.snapshot().load


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, RULED])
def test_the_model_itself_is_always_right(target: Decoder, params: SamplingParams) -> None:
    plain, _ = run(engine(target), None, params)
    drafted, load = run(engine(target), engine(target), params)
    assert drafted == plain
    assert load.accepted_tokens == load.drafted_tokens >= len(plain) * 0.6
    assert load.steps <= len(plain) / 5 + 3


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, RULED])
def test_a_model_with_other_weights_is_nearly_always_wrong_and_changes_nothing(
    target: Decoder, params: SamplingParams
) -> None:
    plain, _ = run(engine(target), None, params)
    drafted, load = run(engine(target), engine(decoder(1)), params)
    assert drafted == plain
    assert load.accepted_tokens <= load.drafted_tokens * 0.2
    assert load.drafted_tokens > 20


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, RULED])
def test_a_model_that_is_nearly_right_has_the_answer_among_its_runners_up(
    target: Decoder, params: SamplingParams
) -> None:
    """The same weights with some noise: it goes astray now and then, and what is right then often comes in next."""
    config, other = tiny_config(), random_weights(tiny_config(), 1)
    weights = {name: weight + 0.04 * other[name] for name, weight in random_weights(config).items()}
    noisy = build_decoder(config, weights.items(), torch.float32)
    plain, _ = run(engine(target), None, params)
    loads = {}
    for takes_trees in (False, True):
        drafted, loads[takes_trees] = run(engine(target), engine(noisy), params, takes_trees=takes_trees)
        assert drafted == plain
    assert loads[True].drafted_tokens > loads[True].accepted_tokens > 10
    if params is GREEDY:
        chain, tree = (load.accepted_at[0] / load.drafts for load in loads.values())
        assert tree > 1.2 * chain


def test_control_stops_asking_a_model_that_is_wrong(target: Decoder) -> None:
    params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
    draft = engine(decoder(1))
    draft.spec = replace(draft.spec, step_costs=DRAFT_COSTS)
    _, load = run(engine(target), draft, params, StepCost(TARGET_COSTS))
    assert load.drafted_tokens < 60


def test_control_keeps_asking_a_model_that_is_right(target: Decoder) -> None:
    params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
    draft = engine(target)
    draft.spec = replace(draft.spec, step_costs=DRAFT_COSTS)
    _, load = run(engine(target), draft, params, StepCost(TARGET_COSTS))
    assert load.accepted_tokens > 250


def test_a_draft_model_without_room_drafts_nothing(target: Decoder) -> None:
    plain, _ = run(engine(target), None, GREEDY)
    drafted, load = run(engine(target), engine(target, num_blocks=9), GREEDY)
    assert drafted == plain
    assert 0 < load.drafted_tokens < 10  # until its pool of 36 tokens was full


def test_a_long_prompt_is_read_over_several_steps() -> None:
    target, draft = FakeEngine(256), FakeEngine(256)
    proposer = ModelProposer(draft, target.spec)
    runner = LocalRunner(target, FakeClock(), 1024, Speculator([proposer], 4, None, takes_trees=False))
    prompt = [n % 900 + 1 for n in range(2 * MAX_NEW_TOKENS + 50)]
    params = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0, seed=5)
    sizes = [len(item.tokens) for item in runner.stream(prompt, params)]
    assert sizes[:3] == [1, 1, 1]
    assert max(sizes[3:]) == 5


def test_drafts_of_the_fake_engine_by_itself_are_exact() -> None:
    target = FakeEngine(64)
    runner = LocalRunner(target, FakeClock(), 64, Speculator([ModelProposer(FakeEngine(64), target.spec)], 4, None))
    ids = [token.token_id for item in runner.stream(PROMPT, SAMPLED) for token in item.tokens]
    assert ids == expected_tokens(PROMPT, SAMPLED)[0]


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="the draft model has 7 tokens, the model 1000"):
        ModelProposer(FakeEngine(vocab_size=7), FakeEngine().spec)


def test_build_opens_the_draft_model_by_its_name() -> None:
    opened: list[str] = []

    def open_draft(name: str) -> FakeEngine:
        opened.append(name)
        return FakeEngine()

    assert isinstance(build_speculation("draft:small:er", 4, FakeEngine().spec, Openers(open_draft)), Speculator)
    assert opened == ["small:er"]
