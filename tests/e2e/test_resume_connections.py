"""Exact resume when connections break, what it reuses, and the text of a stream that was resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from penstock.gateway.choice import Choice
from penstock.gateway.requests import AnswerOptions
from penstock.models.tokenizer import Tokenizer
from penstock.protocol.messages import FromWorker, Output
from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import GenerateRequest, TokensEvent
from penstock.testing.inprocess import InProcessCluster, Result

from .conftest import MakeEngine
from .resuming import (
    GREEDY,
    KINDS,
    ROUTER,
    AtTurn,
    Fault,
    assert_exact,
    holder,
    one_and_one,
    two_and_two,
    undisturbed,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


# ---- connections are lost and the workers live


@pytest.mark.parametrize("kind", ["seeded", "penalties", "n=3"])
def test_router_connection_lost_and_back_changes_nothing(
    kind: str, make_engine: MakeEngine, request_of: Callable[[SamplingParams], GenerateRequest]
) -> None:
    """What the worker said meanwhile never arrives; the gap is noticed and the stream resumed in front of it."""
    request = request_of(KINDS[kind])
    cut_off: dict[str, int] = {}

    def cut(cluster: InProcessCluster) -> None:
        name = holder(cluster, "decode")
        cluster.cut_off(name)
        cut_off[name] = cluster.workers[name].core.snapshot().load.steps

    def join_again(cluster: InProcessCluster) -> None:
        fault(cluster)
        for name, step in cut_off.items():
            if cluster.workers[name].core.snapshot().load.steps >= step + 3:
                cluster.join_again(name)

    fault = Fault(3, cut)
    with two_and_two(make_engine) as cluster:
        found = cluster.run([request], each_turn=join_again)
    assert cut_off
    assert found["r"].resumed == 1
    assert_exact(found, undisturbed(make_engine, request))


def test_router_connection_lost_over_the_end_of_the_answer_changes_nothing(
    make_engine: MakeEngine, request_of: Callable[[SamplingParams], GenerateRequest]
) -> None:
    """The worker finishes in the dark; its heartbeat no longer names the attempt."""
    request = request_of(GREEDY)

    def join_when_idle(cluster: InProcessCluster) -> None:
        fault(cluster)
        if fault.happened_at is not None and cluster.workers["decode-0"].core.is_idle:
            cluster.join_again("decode-0")

    fault = Fault(6, lambda cluster: cluster.cut_off("decode-0"))
    with one_and_one(make_engine) as cluster:
        found = cluster.run([request], each_turn=join_when_idle)
    assert found["r"].resumed == 1
    assert_exact(found, undisturbed(make_engine, request))


def test_one_lost_message_of_tokens_changes_nothing(
    make_engine: MakeEngine, request_of: Callable[[SamplingParams], GenerateRequest]
) -> None:
    request = request_of(KINDS["seeded"])
    lost: list[int] = []

    def loses(frame: FromWorker) -> bool:
        if lost or not isinstance(frame.body, Output) or frame.body.items[0].index != 4:
            return False
        lost.append(4)
        return True

    with two_and_two(make_engine) as cluster:
        cluster.lose(loses)
        found = cluster.run([request])
        assert cluster.router.counters.broken_streams == 1
    assert lost
    assert found["r"].resumed == 1
    assert_exact(found, undisturbed(make_engine, request))


def test_link_lost_during_the_hand_off_changes_nothing(
    make_engine: MakeEngine, request_of: Callable[[SamplingParams], GenerateRequest]
) -> None:
    request = request_of(KINDS["penalties"])
    engines = {name: make_engine(64) for name in ("prefill-0", "decode-0")}
    broken: list[int] = []

    def break_once(cluster: InProcessCluster) -> None:
        if broken:
            cluster.mend_links()
        elif cluster.workers["decode-0"].core.snapshot().load.receiving:
            cluster.break_link("prefill-0", "decode-0")
            broken.append(1)

    with InProcessCluster(engines, router=ROUTER, max_batch_tokens=16) as cluster:
        found = cluster.run([request], each_turn=break_once)
    assert broken
    assert (found["r"].attempts, found["r"].resumed) == (2, 0)
    assert_exact(found, undisturbed(make_engine, request))


# ---- what survives is used again


def test_resumption_reuses_the_blocks_that_survive_on_both_sides(
    make_engine: MakeEngine, chats: list[list[int]]
) -> None:
    """Prefill still has the prompt. The other decode worker has the head of it, which does not travel."""
    prompt = chats[7][:64]
    before = GenerateRequest("before", prompt[:48] + chats[2], SamplingParams(max_tokens=4, ignore_eos=True), 300.0)
    request = GenerateRequest("r", prompt, KINDS["greedy"], 300.0)
    engines = {name: make_engine(64) for name in ("prefill-0", "decode-0", "decode-1")}
    hits: list[int] = []
    moved: list[int] = []

    def kill(cluster: InProcessCluster) -> None:
        hits.append(cluster.workers["prefill-0"].core.snapshot().load.prefix_hit_tokens)
        moved.append(cluster.workers["decode-0"].core.snapshot().load.transferred_blocks)
        cluster.kill("decode-1")

    with InProcessCluster(engines, router=replace(ROUTER, policy="round-robin")) as cluster:
        cluster.run([before])
        found = cluster.run([request], each_turn=Fault(5, kill))
        loads = {name: worker.core.snapshot().load for name, worker in cluster.workers.items()}
    assert found["r"].resumed == 1
    assert loads["prefill-0"].prefix_hit_tokens - hits[0] == 64, "the whole prompt comes from prefill's cache"
    # 64 + 5 tokens are five blocks, of which decode-0 has the first three from the other request.
    assert loads["decode-0"].transferred_blocks - moved[0] == 2
    assert_exact(found, undisturbed(make_engine, request))


# ---- the text of a resumed stream


class Reader:
    """The gateway's view of a choice: text, stop strings, logprob entries."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, stop: tuple[str, ...]) -> None:
        options = AnswerOptions(model="m", stop=stop, top_logprobs=2)
        self.choice = Choice(0, tokenizer, params, options)
        self.text, self.entries = "", 0

    def read(self, event: TokensEvent) -> None:
        delta = self.choice.take(event)
        if delta is not None:
            self.text += delta.text
            self.entries += len(delta.entries)

    @property
    def seen(self) -> tuple[str, int, str | None, int]:
        return self.text, self.entries, self.choice.finish_reason, self.choice.num_tokens


def read(
    cluster: InProcessCluster, request: GenerateRequest, reader: Reader, at_turn: AtTurn | None = None
) -> dict[str, Result]:
    """Run the request as the gateway does: its stop string ends it."""

    def each_turn(cluster: InProcessCluster) -> None:
        if at_turn is not None:
            at_turn(cluster)
        if reader.choice.was_stopped_here:
            cluster.cancel("r")

    return cluster.run([request], each_turn=each_turn, on_tokens=lambda _, event: reader.read(event))


@pytest.mark.parametrize("index", [1, 3, 4, 5, 6])
def test_stop_string_that_spans_the_resumption_is_found(
    index: int, make_engine: MakeEngine, chats: list[list[int]], tokenizer: Tokenizer
) -> None:
    """Half of it came from the worker that died. Its text was held back, and its logprobs with it."""
    params = SamplingParams(max_tokens=24, temperature=0, logprobs=2, ignore_eos=True)
    request = GenerateRequest("r", chats[1], params, 300.0)
    ids = undisturbed(make_engine, request)["r"].answers[0].token_ids
    stop = tokenizer.decode(ids[3:7])
    expected, found = (Reader(tokenizer, params, (stop,)) for _ in range(2))
    with one_and_one(make_engine) as cluster:
        read(cluster, request, expected)
    fault = Fault(index, lambda cluster: cluster.kill(holder(cluster, "decode")))
    with two_and_two(make_engine) as cluster:
        result = read(cluster, request, found, fault)
    assert fault.happened_at is not None
    assert result["r"].resumed == 1
    assert expected.seen == found.seen
    assert expected.seen[2] == "stop"
    assert expected.seen[3] == 7
