"""The router learns the blocks of an answer when it ends, so that the next turn goes where they are."""

from __future__ import annotations

import pytest

from penstock.core.ids import WorkerKey
from penstock.core.prefix_hash import hash_key
from penstock.protocol.messages import Output, Tokens, pack_ids
from penstock.protocol.sampling import SamplingParams
from penstock.router import placement
from penstock.router.interface import GenerateRequest
from penstock.router.placement import Placer
from penstock.router.prefix_ladder import extend_rung_hashes

from .conftest import Rig

SIZE = 4  # tokens in a block of the rig's workers


def affine(**settings: object) -> Rig:
    return Rig(policy="prefix-affinity", **settings)


def placer_of(rig: Rig) -> Placer:
    return rig.core._life.placer


def turn(rig: Rig, request_id: str, prompt_ids: list[int], *, max_tokens: int = 8, n: int = 1) -> WorkerKey:
    """Submit a prompt; the decode worker it goes to."""
    params = SamplingParams(max_tokens=max_tokens, n=n)
    effects = rig.core.submit(GenerateRequest(request_id, prompt_ids, params, 60.0))
    rig.tokens[request_id] = {choice: [] for choice in range(n)}
    rig.finished[request_id] = {}
    rig.do(effects)
    return rig.start(request_id)[0]


def held_blocks(rig: Rig, token_ids: list[int], worker: WorkerKey) -> int:
    """Leading blocks of these tokens that the index ascribes to `worker`."""
    placer = placer_of(rig)
    hashes: list[int] = []
    extend_rung_hashes(hashes, hash_key("", placer._secret, "router"), pack_ids(token_ids), SIZE)
    return placer.index.match(hashes).get(worker, 0)


@pytest.mark.parametrize("num_output", [1, 2, 3, 6, 7, 8])
def test_finished_answer_is_known_up_to_its_last_computed_token(num_output: int) -> None:
    rig = affine()
    rig.join("d0")
    prompt = list(range(10))
    worker = turn(rig, "r", prompt, max_tokens=num_output)
    assert held_blocks(rig, prompt, worker) == len(prompt) // SIZE
    rig.out(num_output, end="length")
    answer = rig.tokens["r"][0]
    assert held_blocks(rig, prompt + answer + [7] * 8, worker) == (len(prompt) + num_output - 1) // SIZE


def test_answer_that_ends_with_a_stop_token_is_known_whole() -> None:
    rig = affine()
    rig.join("d0")
    worker = turn(rig, "r", list(range(10)))
    rig.out(6)
    assert held_blocks(rig, list(range(10)) + rig.tokens["r"][0], worker) == 2
    rig.say(worker, Output([Tokens("r", rig.start("r")[1].attempt, 0, 6, (), "stop", stop_token=2)]))
    assert "r" in rig.ends
    assert held_blocks(rig, list(range(10)) + rig.tokens["r"][0], worker) == 4


@pytest.mark.parametrize("choice", [None, 0])
def test_cancelled_answer_is_known_as_far_as_it_came(choice: int | None) -> None:
    rig = affine()
    rig.join("d0")
    worker = turn(rig, "r", list(range(10)), n=1 if choice is None else 2)
    rig.out(7)
    rig.cancel("r", choice)
    assert held_blocks(rig, list(range(10)) + rig.tokens["r"][0], worker) == 4


def test_second_turn_goes_to_the_worker_that_holds_the_first() -> None:
    """Both workers hold the system prompt; only the answers tell the two conversations apart."""
    rig = affine(max_imbalance_tokens=0)
    rig.join("d0")
    rig.join("d1")
    heads = {"a": [*range(16), 500, 501], "b": [*range(16), 600, 601]}
    workers = {name: turn(rig, name, head) for name, head in heads.items()}
    assert workers["a"] != workers["b"]
    for name in heads:
        rig.out(8, request_id=name, end="length")
    for name, head in heads.items():
        assert turn(rig, f"{name}2", [*head, *rig.tokens[name][0], 9, 9, 9]) == workers[name]
        rig.out(8, request_id=f"{name}2", end="length")


@pytest.mark.parametrize("policy", ["least-loaded", "round-robin"])
def test_policy_that_reads_no_prefixes_hashes_nothing(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hashing(*_: object) -> None:
        raise AssertionError("hashed for nobody")

    monkeypatch.setattr(placement, "extend_rung_hashes", no_hashing)
    rig = Rig(policy=policy)
    rig.join("d0")
    turn(rig, "r", list(range(10)))
    rig.out(8, end="length")
    assert "r" in rig.ends
    assert len(placer_of(rig).index) == 0


def test_hashing_of_an_answer_and_the_index_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "MAX_ANSWER_BLOCKS", 3)
    monkeypatch.setattr(placement, "MAX_ANSWERS", 1)
    rig = affine(max_prefix_blocks=6)
    rig.join("d0")
    prompt = list(range(8))
    worker = turn(rig, "r", prompt, max_tokens=40, n=2)
    rig.out(40, choice=0, end="length")
    rig.out(40, choice=1, end="length")
    assert "r" in rig.ends
    assert held_blocks(rig, prompt + rig.tokens["r"][0], worker) == 2 + 3
    assert held_blocks(rig, prompt + rig.tokens["r"][1], worker) == 2
    turn(rig, "s", list(range(100, 200)))
    assert len(placer_of(rig).index) == 6


def test_lost_worker_is_not_learned_again_when_its_answers_end() -> None:
    rig = affine()
    worker = rig.join("d0")
    prompt = list(range(10))
    turn(rig, "r", prompt)
    rig.out(7)
    rig.do(rig.core.worker_lost("d0", "killed"))
    rig.cancel("r")
    assert held_blocks(rig, prompt + rig.tokens["r"][0], worker) == 0


def test_attempt_that_has_not_begun_teaches_nothing_of_an_earlier_answer() -> None:
    """After a retry the tokens of the first attempt are computed elsewhere, and not yet."""
    rig = affine()
    rig.join("d0")
    rig.join("d1")
    prompt = list(range(10))
    first = turn(rig, "r", prompt)
    rig.out(7)
    rig.failed(retriable=True)
    second = rig.start("r")[0]
    assert second != first
    rig.cancel("r")
    assert held_blocks(rig, prompt + rig.tokens["r"][0], second) == len(prompt) // SIZE
