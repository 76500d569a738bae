"""Streams whose drafts are trees are those without drafts: on a tiny model, natively and in torch, whatever branches,
across block borders, with preemption, and with what a draft head is shown.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from penstock.decode_node.local import LocalRunner
from penstock.engine.interface import ScheduledSeq
from penstock.engine.model_runner import ModelRunner
from penstock.engine.sequence import Sequence
from penstock.engine.speculation.control import Speculator
from penstock.engine.torch_engine import TorchEngine, build_decoder
from penstock.protocol.messages import SampledToken, WorkerLoad
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.sim_drafts import SeededProposer
from penstock.testing.tiny_model import random_weights, tiny_config

CONFIG = tiny_config(hidden_size=96)
PROMPT = list(range(20, 50))
GREEDY = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
KINDS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(max_tokens=60, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True),
    "rules": SamplingParams(
        max_tokens=60, temperature=0.8, seed=3, repetition_penalty=1.2, min_tokens=50, logit_bias={9: 4.0}
    ),
    "logprobs": SamplingParams(max_tokens=40, temperature=0, presence_penalty=0.7, logprobs=2, ignore_eos=True),
}
Streams = dict[int, list[SampledToken]]


@pytest.fixture(scope="module", params=["native", "bfloat16 cache", "torch"])
def engines(request: pytest.FixtureRequest) -> Iterator[list[TorchEngine]]:
    """Two engines over one network, the second of which has little room."""
    is_grouped = request.param != "torch"
    dtype = torch.bfloat16 if request.param == "bfloat16 cache" else torch.float32
    decoder = build_decoder(CONFIG, random_weights(CONFIG).items(), dtype, grouped=is_grouped)
    both = [
        TorchEngine(decoder, model_name="tiny", identity="abc", num_blocks=blocks, block_size=4) for blocks in (200, 30)
    ]
    if is_grouped and not both[0].is_native:
        pytest.skip("no native kernels here")
    yield both
    for engine in both:
        engine.memory.close()


def run(
    engine: TorchEngine, params: SamplingParams, know: Streams | None = None, seed: int = 0
) -> tuple[Streams, WorkerLoad]:
    """Without `know` nothing is drafted; with it drafts are trees around these tokens."""

    def next_ids(seq: Sequence, count: int) -> list[int]:
        begin = len(seq.output_ids)
        return [token.token_id for token in (know or {})[seq.choice][begin : begin + count]]

    speculation = Speculator([SeededProposer(0.8, seed, 1.0, next_ids)], 10, None) if know is not None else None
    runner = LocalRunner(engine, FakeClock(), 64, speculation)
    streams: Streams = {choice: [] for choice in range(params.n)}
    for item in runner.stream(PROMPT, params):
        streams[item.choice] += item.tokens
        runner.core.check_invariants()
    return streams, runner.core.snapshot().load


def assert_same(found: Streams, expected: Streams, *, exact: bool) -> None:
    for choice, tokens in expected.items():
        assert [token.token_id for token in found[choice]] == [token.token_id for token in tokens]
        for one, other in zip(found[choice], tokens, strict=True):
            if one.logprob is None or other.logprob is None:
                assert one.logprob is other.logprob
            elif exact:
                assert one.logprob == other.logprob
            else:
                assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_with_trees_are_those_without(engines: list[TorchEngine], kind: str) -> None:
    engine, params = engines[0], KINDS[kind]
    plain, _ = run(engine, params)
    for seed in range(4):
        found, load = run(engine, params, plain, seed)
        assert_same(found, plain, exact=engine.is_native)
        assert load.drafted_tokens > load.accepted_tokens > 10


def test_preempted_sequences_with_trees_go_on_the_same(engines: list[TorchEngine]) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.9, seed=5, n=4, ignore_eos=True)
    plain, _ = run(engines[0], params)
    found, load = run(engines[1], params, plain)
    assert_same(found, plain, exact=True)
    assert load.preemptions > 0
    assert load.accepted_tokens > 10


def test_a_path_that_is_not_moved_shows_in_the_stream(
    engines: list[TorchEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = run(engines[0], GREEDY)
    monkeypatch.setattr(ModelRunner, "move", lambda *_: None)
    found, _ = run(engines[0], GREEDY, plain)
    assert found != plain


class Shown:
    """Keeps the hidden states of each position."""

    def __init__(self, engine: TorchEngine) -> None:
        self.rows: dict[int, torch.Tensor] = {}
        engine.show_steps((1, -1), self.observe)

    def observe(self, batch: list[ScheduledSeq], drawn: list[tuple[SampledToken, ...]], features: torch.Tensor) -> None:
        ((entry, tokens),) = zip(batch, drawn, strict=True)
        assert len(features) == len(tokens)
        for place, row in enumerate(features):
            self.rows[entry.seq.num_tokens - 1 + place] = row.clone()


def test_a_draft_head_is_shown_the_path(engines: list[TorchEngine]) -> None:
    plain, _ = run(engines[0], GREEDY)
    without = Shown(engines[0])
    run(engines[0], GREEDY)
    shown = Shown(engines[0])
    run(engines[0], GREEDY, plain)
    engines[0].show_steps((), None)
    assert shown.rows.keys() == without.rows.keys()
    for position, row in shown.rows.items():
        assert (row - without.rows[position]).abs().max() <= (0 if engines[0].is_native else 1e-4), position
