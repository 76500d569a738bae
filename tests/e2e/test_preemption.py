"""Preempted sequences with the real model: parked or computed again, they answer as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.engine.torch_engine import TorchEngine
from penstock.protocol.messages import WorkerLoad
from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import GenerateRequest
from penstock.testing.inprocess import InProcessCluster, Result

from .comparing import assert_equal, requests_of
from .conftest import MakeEngine

SIZE = 16

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

GREEDY = SamplingParams(max_tokens=20, temperature=0, logprobs=3, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.95, seed=5, logprobs=3, ignore_eos=True)


def colocated(engine: TorchEngine, requests: list[GenerateRequest]) -> dict[str, Result]:
    """The answers of one worker with room for everything."""
    with InProcessCluster({"both-0": engine}) as cluster:
        results = cluster.run(requests)
        assert load_of(cluster, "both-0").preemptions == 0
    return results


def load_of(cluster: InProcessCluster, name: str) -> WorkerLoad:
    return cluster.workers[name].core.snapshot().load


@pytest.fixture
def prompts(chats: list[list[int]]) -> list[list[int]]:
    """Prompts of 1, 15, 16, 17, 31, 32 and 33 tokens: around block boundaries."""
    long = [token for chat in chats for token in chat]
    return [long[100 * i : 100 * i + length] for i, length in enumerate((33, 1, 15, 16, 17, 31, 32))]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("park_bytes", [0, 1 << 28], ids=["computed again", "parked"])
def test_preempted_sequences_answer_as_if_never_preempted(
    park_bytes: int, params: SamplingParams, make_engine: MakeEngine, prompts: list[list[int]], tmp_path: Path
) -> None:
    requests = requests_of(prompts, params)
    engines = {"prefill-0": make_engine(64), "decode-0": make_engine(9)}
    with InProcessCluster(engines, transport="shm", runtime_dir=tmp_path, park_bytes=park_bytes) as cluster:
        found = cluster.run(requests)
        load = load_of(cluster, "decode-0")
    assert load.preemptions > 0
    assert (load.parked > 0) == (park_bytes > 0)
    assert load.unparked == load.parked
    assert (load.parked_bytes, load.corrupt_parked_blocks) == (0, 0)
    assert_equal(found, colocated(make_engine(64), requests))


def test_second_turn_of_a_chat_transfers_the_difference_and_answers_the_same(
    make_engine: MakeEngine, chats: list[list[int]], tmp_path: Path
) -> None:
    first = chats[7]
    engines = {"prefill-0": make_engine(64), "decode-0": make_engine(64)}
    with InProcessCluster(engines, transport="shm", runtime_dir=tmp_path) as cluster:
        answer = cluster.run(requests_of([first], GREEDY))["r0"].answers[0].token_ids
        moved = load_of(cluster, "decode-0").transferred_blocks
        assert moved == -(-len(first) // SIZE)
        second = [*first, *answer, *chats[0]]
        found = cluster.run(requests_of([second], SEEDED))
        moved = load_of(cluster, "decode-0").transferred_blocks - moved
    held = (len(first) + len(answer) - 1) // SIZE
    assert held > len(first) // SIZE, "the answer is to fill at least one block"
    assert moved == -(-len(second) // SIZE) - held
    assert_equal(found, colocated(make_engine(64), requests_of([second], SEEDED)))
