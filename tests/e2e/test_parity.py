"""Prefill → transfer → decode equals colocated, token by token and logprob by logprob, on the real model in float32.

Sums of different batch shapes differ in the last bits, so logprobs are compared within LOGPROB_TOLERANCE; tokens
exactly.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.errors import InternalError
from penstock.decode_node.local import LocalRunner
from penstock.engine.interface import OnLayers, ScheduledSeq
from penstock.engine.torch_engine import TorchEngine
from penstock.protocol.messages import SampledToken
from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import GenerateRequest
from penstock.testing.inprocess import InProcessCluster, Result

from .comparing import assert_equal, requests_of
from .conftest import MakeEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

GREEDY = SamplingParams(max_tokens=12, temperature=0, logprobs=3, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, seed=5, logprobs=3, ignore_eos=True)
PENALISED = SamplingParams(
    max_tokens=12, temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=1, ignore_eos=True
)
FORKED = SamplingParams(max_tokens=10, temperature=1.0, n=3, seed=8, logprobs=1, ignore_eos=True)


def colocated(engine: TorchEngine, requests: list[GenerateRequest], max_batch_tokens: int = 512) -> dict[str, Result]:
    with InProcessCluster({"both-0": engine}, max_batch_tokens=max_batch_tokens) as cluster:
        return cluster.run(requests)


@pytest.fixture
def odd_lengths(chats: list[list[int]]) -> list[list[int]]:
    """Prompts of 1, 15, 16, 17, 31, 32, 33 and 63 tokens: around block boundaries and far from them."""
    long = [token for chat in chats for token in chat]
    return [long[100 * i : 100 * i + length] for i, length in enumerate((1, 15, 16, 17, 31, 32, 33, 63))]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALISED, FORKED], ids=["greedy", "seeded", "penalties", "n=3"])
def test_disaggregated_equals_colocated_at_odd_lengths(
    transport: str, params: SamplingParams, make_engine: MakeEngine, odd_lengths: list[list[int]], tmp_path: Path
) -> None:
    requests = requests_of(odd_lengths, params)
    engines = {"prefill-0": make_engine(64), "decode-0": make_engine(128)}
    with InProcessCluster(engines, transport=transport, runtime_dir=tmp_path) as cluster:
        found = cluster.run(requests)
        assert cluster.router.counters.remote_prefills == len(requests)
    assert_equal(found, colocated(make_engine(128), requests))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_disaggregated_equals_colocated_when_prompts_are_chunked(
    transport: str, make_engine: MakeEngine, odd_lengths: list[list[int]], tmp_path: Path
) -> None:
    requests = requests_of(odd_lengths, GREEDY)
    engines = {"prefill-0": make_engine(64), "decode-0": make_engine(64)}
    with InProcessCluster(engines, transport=transport, runtime_dir=tmp_path, max_batch_tokens=11) as cluster:
        found = cluster.run(requests)
    assert_equal(found, colocated(make_engine(64), requests))


def test_disaggregated_equals_colocated_on_prefix_hits(
    make_engine: MakeEngine, chats: list[list[int]], tmp_path: Path
) -> None:
    shared = chats[7]
    prompts = [shared, shared + chats[0], shared[:40] + chats[1], shared + chats[0] + chats[2]]
    engines = {"prefill-0": make_engine(64), "decode-0": make_engine(64)}
    with InProcessCluster(engines, transport="shm", runtime_dir=tmp_path) as cluster:
        cluster.run(requests_of([shared], GREEDY))
        found = cluster.run([GenerateRequest(f"r{i}", prompt, GREEDY, 300.0) for i, prompt in enumerate(prompts)])
        loads = {name: worker.core.snapshot().load for name, worker in cluster.workers.items()}
    assert loads["prefill-0"].prefix_hit_tokens > 0
    assert loads["decode-0"].prefix_hit_tokens > 0
    total_blocks = sum(-(-len(prompt) // 16) for prompt in [shared, *prompts])
    assert loads["decode-0"].transferred_blocks < total_blocks, "blocks that decode holds must not travel"
    assert_equal(found, colocated(make_engine(64), requests_of(prompts, GREEDY)))


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_disaggregated_equals_colocated_after_preemption(
    params: SamplingParams, make_engine: MakeEngine, odd_lengths: list[list[int]], tmp_path: Path
) -> None:
    requests = requests_of(odd_lengths, params)
    engines = {"prefill-0": make_engine(64), "decode-0": make_engine(9)}
    with InProcessCluster(engines, transport="shm", runtime_dir=tmp_path) as cluster:
        found = cluster.run(requests)
        assert cluster.workers["decode-0"].core.snapshot().load.preemptions > 0
    assert_equal(found, colocated(make_engine(64), requests))


class FailsOnce(TorchEngine):
    """Every request's first prefill attempt breaks at its last chunk."""

    def execute(self, batch: list[ScheduledSeq], on_layers: OnLayers | None = None) -> list[tuple[SampledToken, ...]]:
        if any(entry.sample and entry.seq.key.attempt == 1 for entry in batch):
            raise InternalError("planted")
        return super().execute(batch, on_layers)


def test_disaggregated_equals_colocated_after_a_retried_prefill(
    make_engine: MakeEngine, base_engine: TorchEngine, odd_lengths: list[list[int]], tmp_path: Path
) -> None:
    requests = requests_of(odd_lengths, GREEDY)
    failing = FailsOnce(base_engine.decoder, model_name="smollm2", identity="test", num_blocks=64)
    with InProcessCluster(
        {"prefill-0": failing, "decode-0": make_engine(64)}, transport="shm", runtime_dir=tmp_path
    ) as cluster:
        found = cluster.run(requests)
    failing.memory.close()
    assert all(result.attempts > 1 for result in found.values())
    assert_equal(found, colocated(make_engine(64), requests))


@pytest.mark.slow
def test_32_concurrent_streams_equal_one_by_one(
    make_engine: MakeEngine, chats: list[list[int]], tmp_path: Path
) -> None:
    prompts = [chats[i % len(chats)] + [100 + i] * (i // len(chats)) for i in range(32)]
    requests = [
        GenerateRequest(f"r{i}", prompt, SamplingParams(max_tokens=4 + i % 13, temperature=0, ignore_eos=True), 300.0)
        for i, prompt in enumerate(prompts)
    ]
    engines = {"prefill-0": make_engine(128), "decode-0": make_engine(192)}
    with InProcessCluster(engines, transport="shm", runtime_dir=tmp_path) as cluster:
        found = cluster.run(requests, timeout_s=250.0)
    runner = LocalRunner(make_engine(64))
    for request in requests:
        alone = [t.token_id for item in runner.stream(request.prompt_ids, request.params) for t in item.tokens]
        assert found[request.request_id].answers[0].token_ids == alone


def test_engine_isolates_a_request_that_breaks_its_step(make_engine: MakeEngine, chats: list[list[int]]) -> None:
    """One request whose step raises ends with an error; the others' tokens do not change."""
    good = requests_of(chats[:3], GREEDY)
    bad = GenerateRequest("bad", chats[3], GREEDY, 300.0)
    engine = make_engine(64)
    original = engine.execute

    def execute(batch: list[ScheduledSeq], on_layers: OnLayers | None = None) -> list[tuple[SampledToken, ...]]:
        if any(entry.seq.key.request_id == "bad" and entry.seq.output_ids for entry in batch):
            raise RuntimeError("planted")
        return original(batch, on_layers)

    engine.execute = execute  # type: ignore[method-assign]
    with InProcessCluster({"both-0": engine}) as cluster:
        found = cluster.run([*good, bad])
    assert found["bad"].error is not None
    assert_equal({r.request_id: found[r.request_id] for r in good}, colocated(make_engine(64), good))
