"""Turns of a conversation over the hand-off: what decode holds of earlier turns does not travel again."""

from __future__ import annotations

import pytest

from penstock.engine.sequence import blocks_for
from penstock.protocol.sampling import SamplingParams
from penstock.router.config import RouterConfig
from penstock.router.interface import GenerateRequest
from penstock.testing.fake_engine import FakeEngine, expected_tokens
from penstock.testing.inprocess import PATIENCE_S, InProcessCluster

SIZE = 4


def transferred(cluster: InProcessCluster, name: str) -> int:
    return cluster.workers[name].core.snapshot().load.transferred_blocks


def turn(cluster: InProcessCluster, name: str, prompt: list[int], num_output: int) -> list[int]:
    """The answer to `prompt`, which is checked against a run without any cache."""
    params = SamplingParams(max_tokens=num_output, temperature=0, ignore_eos=True)
    answer = cluster.run([GenerateRequest(name, prompt, params, 300.0)])[name].answers[0].token_ids
    assert answer == expected_tokens(prompt, params)[0]
    return answer


@pytest.mark.parametrize("num_prompt", [3, 8, 9])
@pytest.mark.parametrize("num_output", [1, 4, 7, 8])
@pytest.mark.parametrize("num_new", [1, 6])
def test_second_turn_transfers_only_the_difference(num_prompt: int, num_output: int, num_new: int) -> None:
    """The last token of an answer is never computed, so its block is new; all full ones before it are there."""
    engines = {"prefill-0": FakeEngine(), "decode-0": FakeEngine()}
    with InProcessCluster(engines) as cluster:
        prompt = list(range(1, 1 + num_prompt))
        first = turn(cluster, "one", prompt, num_output)
        assert transferred(cluster, "decode-0") == blocks_for(num_prompt, SIZE)
        following = [*prompt, *first, *range(700, 700 + num_new)]
        turn(cluster, "two", following, 5)
        held = (num_prompt + num_output - 1) // SIZE
        moved = transferred(cluster, "decode-0") - blocks_for(num_prompt, SIZE)
        assert moved == blocks_for(len(following), SIZE) - held


def test_every_turn_of_a_long_conversation_transfers_only_what_is_new() -> None:
    engines = {"prefill-0": FakeEngine(128), "decode-0": FakeEngine(128)}
    with InProcessCluster(engines) as cluster:
        history: list[int] = []
        held = 0
        for number in range(6):
            prompt = [*history, *(100 * number + i for i in range(7))]
            before = transferred(cluster, "decode-0")
            history = [*prompt, *turn(cluster, f"turn-{number}", prompt, 9)]
            assert transferred(cluster, "decode-0") - before == blocks_for(len(prompt), SIZE) - held
            held = (len(history) - 1) // SIZE


def test_second_turns_go_back_to_the_decode_worker_of_the_first() -> None:
    """Two conversations with the same head, begun at the same time on two decode workers."""
    engines = {"prefill-0": FakeEngine(128), "decode-0": FakeEngine(128), "decode-1": FakeEngine(128)}
    router = RouterConfig(
        policy="prefix-affinity",
        max_imbalance_tokens=0,
        worker_timeout_s=PATIENCE_S,
        unacknowledged_s=PATIENCE_S,
    )
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    heads = {"a": [*range(1, 17), 500, 501], "b": [*range(1, 17), 600, 601]}
    with InProcessCluster(engines, router=router) as cluster:
        results = cluster.run([GenerateRequest(name, head, params, 300.0) for name, head in heads.items()])
        first = {name: transferred(cluster, name) for name in ("decode-0", "decode-1")}
        assert min(first.values()) > 0, "the conversations are to begin on different workers"
        followings = {n: [*head, *results[n].answers[0].token_ids, 7, 8, 9] for n, head in heads.items()}
        for name, following in followings.items():
            answer = turn(cluster, f"{name}2", following, 5)
            assert len(answer) == 5
        moved = sum(transferred(cluster, name) for name in first) - sum(first.values())
        assert moved == sum(blocks_for(len(f), SIZE) - (len(f) - 4) // SIZE for f in followings.values())


def test_answer_survives_a_preemption_and_is_found_by_the_next_turn() -> None:
    """Preempted, parked and back again: the blocks of prompt and answer end up in the prefix cache all the same."""
    engines = {"prefill-0": FakeEngine(64), "decode-0": FakeEngine(12)}
    params = SamplingParams(max_tokens=17, temperature=0, ignore_eos=True)
    prompts = {name: [100 * i + j for j in range(9)] for i, name in enumerate("abc", 1)}
    with InProcessCluster(engines, park_bytes=1 << 20) as cluster:
        results = cluster.run([GenerateRequest(name, p, params, 300.0) for name, p in prompts.items()])
        load = cluster.workers["decode-0"].core.snapshot().load
        assert load.unparked > 0
        before = load.transferred_blocks
        youngest = [*prompts["c"], *results["c"].answers[0].token_ids]
        assert results["c"].answers[0].token_ids == expected_tokens(prompts["c"], params)[0]
        turn(cluster, "c2", [*youngest, 9, 9, 9], 2)
        held = (len(youngest) - 1) // SIZE
        assert transferred(cluster, "decode-0") - before == blocks_for(len(youngest) + 3, SIZE) - held
