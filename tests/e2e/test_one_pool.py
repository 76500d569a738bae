"""One memory for all workers: the answers are those of any other cluster, not a byte moves, no block is ever lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.decode_node.local import LocalRunner
from penstock.models.tokenizer import Tokenizer
from penstock.protocol.sampling import SamplingParams
from penstock.testing.fault_run import ENVIRONMENT, FaultPlan, run_faults, wait_whole, wrong_answers
from penstock.testing.process_faults import FaultKind, strike, wait_until
from penstock.testing.serving import Serving, serving

from .conftest import MakeEngine

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.timeout(500)]

OPTIONS = ("--one-pool", "--dtype", "float32", "--kv-cache-mib", "128")
NUM_TOKENS = 20


def body_of(prompt: list[int], max_tokens: int = NUM_TOKENS) -> dict[str, Any]:
    greedy = {"temperature": 0, "ignore_eos": True}
    return {"model": "smollm2-135m-instruct", "prompt": prompt, "max_tokens": max_tokens} | greedy


def totals(cluster: Serving) -> dict[str, int]:
    return {name: row["total_blocks"] for name, row in cluster.wait_rest(60).items()}


@pytest.fixture(scope="module")
def cluster(model_path: Path) -> Iterator[Serving]:
    with serving(*OPTIONS, environment=ENVIRONMENT) as running:
        yield running


def test_prompts_that_come_once_are_handed_over_where_they_lie(
    cluster: Serving, make_engine: MakeEngine, tokenizer: Tokenizer, chats: list[list[int]]
) -> None:
    runner, params = LocalRunner(make_engine(64)), SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    num_blocks, before = 0, cluster.wait_rest()["decode-0"]["load"]
    for prompt in chats[:6]:
        alone = [token.token_id for item in runner.stream(prompt, params) for token in item.tokens]
        answer = cluster.post("/v1/completions", body_of(prompt))
        assert answer["choices"][0]["text"] == tokenizer.decode(alone)
        num_blocks += answer["penstock"]["transferred_blocks"]
        assert answer["penstock"]["transferred_bytes"] == 0
    assert {t for row in cluster.workers().values() for t in row["transports"].values()} == {"owner"}
    load = cluster.wait_rest()["decode-0"]["load"]
    assert load["given_blocks"] - before["given_blocks"] == num_blocks > 0
    assert load["transferred_blocks"] - before["transferred_blocks"] == num_blocks
    assert load.get("transferred_bytes", 0) == 0
    assert len(set(totals(cluster).values())) == 1, "each has its own share back"
    assert "a block changes its owner" in cluster.log.read_text()


def test_prefix_that_comes_back_is_copied_and_the_answer_stays_the_same(cluster: Serving, tokenizer: Tokenizer) -> None:
    shared = tokenizer.encode("The same long opening is found again by whoever computes it. " * 6)
    tails = [tokenizer.encode(f"Number {number} asks:") for number in range(4)]
    first = [cluster.post("/v1/completions", body_of(shared + tail)) for tail in tails]
    again = [cluster.post("/v1/completions", body_of(shared + tail)) for tail in tails]
    texts = [[answer["choices"][0]["text"] for answer in answers] for answers in (first, again)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_worker_that_is_killed_takes_no_block_along(cluster: Serving, chats: list[list[int]], victim: str) -> None:
    before = totals(cluster)
    expected = cluster.post("/v1/completions", body_of(chats[7], 48))["choices"][0]["text"]
    events = cluster.stream("/v1/completions", body_of(chats[7], 48))
    text = next(events)["choices"][0]["text"]
    struck = strike(FaultKind.KILL, cluster, cluster.workers()[victim])
    text += "".join(event["choices"][0]["text"] for event in events if event["choices"])
    assert text == expected
    wait_whole(cluster, replaced=struck)
    assert wait_until(lambda: totals(cluster) == before, 20), (before, totals(cluster), cluster.tail())


@pytest.mark.slow
def test_live_streams_survive_kills_and_cut_links(model_path: Path) -> None:
    plan = FaultPlan(moments=8, streams=8, seed=5, kinds=(FaultKind.KILL, FaultKind.LINK))
    with serving(*OPTIONS, "--prefill", "2", "--decode", "2", environment=ENVIRONMENT) as running:
        before = totals(running)
        result = run_faults(running, plan)
        assert [record.error for record in result.records if record.error] == []
        assert wrong_answers(result) == []
        assert all(moment.unstranded_s is not None for moment in result.moments)
        assert (result.leaks, result.shared_memory_left) == ({}, [])
        assert sum(record.resumed for record in result.records) > 0
        assert wait_until(lambda: totals(running) == before, 20), (before, totals(running))
