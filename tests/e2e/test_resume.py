"""Exact resume, on the real model in float32: whichever worker dies at whatever token, the answer is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest

from penstock.protocol.messages import FromWorker, Output
from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import GenerateRequest
from penstock.testing.inprocess import InProcessCluster

from .conftest import MakeEngine
from .resuming import (
    GREEDY,
    KINDS,
    NUM_TOKENS,
    Fault,
    assert_exact,
    colocated,
    each_of,
    holder,
    one_and_one,
    two_and_two,
    undisturbed,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


# ---- a worker dies


@pytest.mark.parametrize("index", [1, 4, NUM_TOKENS - 1])
@pytest.mark.parametrize("kind", list(KINDS))
def test_killed_decode_worker_changes_nothing_in_the_answer(
    kind: str, index: int, make_engine: MakeEngine, request_of: Callable[[SamplingParams], GenerateRequest]
) -> None:
    request = request_of(KINDS[kind])
    fault = Fault(index, lambda cluster: cluster.kill(holder(cluster, "decode")))
    with two_and_two(make_engine) as cluster:
        found = cluster.run([request], each_turn=fault)
    assert fault.happened_at is not None
    assert_exact(found, undisturbed(make_engine, request))
    assert found["r"].resumed == 1


@pytest.mark.parametrize("victim", ["prefill", "decode"])
@pytest.mark.parametrize("kind", ["seeded", "n=3"])
def test_worker_killed_before_the_first_token_changes_nothing(
    kind: str, victim: str, make_engine: MakeEngine, request_of: Callable[[SamplingParams], GenerateRequest]
) -> None:
    request = request_of(KINDS[kind])
    fault = Fault(0, lambda cluster: cluster.kill(holder(cluster, victim)))
    with two_and_two(make_engine) as cluster:
        found = cluster.run([request], each_turn=fault)
    assert fault.happened_at is not None
    assert (found["r"].attempts, found["r"].resumed) == (2, 0)
    assert_exact(found, undisturbed(make_engine, request))


def test_prefill_worker_killed_after_its_part_costs_nothing(
    make_engine: MakeEngine, request_of: Callable[[SamplingParams], GenerateRequest]
) -> None:
    request = request_of(GREEDY)
    killed: list[str] = []

    def kill_both(cluster: InProcessCluster) -> None:
        for name in ("prefill-0", "prefill-1"):
            cluster.kill(name)
            killed.append(name)

    with two_and_two(make_engine) as cluster:
        found = cluster.run([request], each_turn=Fault(3, kill_both))
    assert killed
    assert (found["r"].attempts, found["r"].resumed) == (1, 0)
    assert_exact(found, undisturbed(make_engine, request))


def test_workers_that_die_one_after_the_other_cost_one_resumption_each(
    make_engine: MakeEngine, request_of: Callable[[SamplingParams], GenerateRequest]
) -> None:
    request = request_of(KINDS["penalties"])

    def replace_decode(cluster: InProcessCluster) -> None:
        name = holder(cluster, "decode")
        cluster.kill(name)
        cluster.restart(name, make_engine(64))

    faults = [Fault(index, replace_decode) for index in (2, 5, 8)]
    with two_and_two(make_engine) as cluster:
        found = cluster.run([request], each_turn=each_of(faults))
        assert cluster.router.counters.resumed == 3
    assert found["r"].resumed == 3
    assert_exact(found, undisturbed(make_engine, request))


# ---- only one worker exists: its successor picks the stream up


@pytest.mark.parametrize("index", [0, 1, 5])
@pytest.mark.parametrize("kind", ["seeded", "n=3"])
@pytest.mark.parametrize(("shape", "victim"), [(one_and_one, "decode-0"), (colocated, "both-0")])
def test_restarted_only_worker_picks_the_stream_up(
    shape: Callable[..., Iterator[InProcessCluster]],
    victim: str,
    kind: str,
    index: int,
    make_engine: MakeEngine,
    request_of: Callable[[SamplingParams], GenerateRequest],
) -> None:
    request = request_of(KINDS[kind])
    turns_dead = 0

    def restart_later(cluster: InProcessCluster) -> None:
        nonlocal turns_dead
        if victim in cluster.workers:
            fault(cluster)
            return
        turns_dead += 1
        if turns_dead == 50:
            cluster.restart(victim, make_engine(64))

    fault = Fault(index, lambda cluster: cluster.kill(victim))
    with shape(make_engine) as cluster:  # type: ignore[attr-defined]  # a context manager
        found = cluster.run([request], each_turn=restart_later)
    assert turns_dead >= 50
    assert found["r"].attempts == 2
    assert found["r"].resumed == (1 if fault.happened_at else 0)
    assert_exact(found, undisturbed(make_engine, request))


def test_router_waits_for_a_worker_longer_than_a_model_takes_to_load() -> None:
    from penstock.core.config import Topology
    from penstock.deploy.front import router_config
    from penstock.testing.serving import START_S

    assert router_config(Topology()).unavailable_s >= START_S / 2


# ---- the finish is lost


def test_stop_lost_behind_the_last_token_is_said_by_the_next_attempt(
    make_engine: MakeEngine, chats: list[list[int]]
) -> None:
    """An end of text is told behind the last token; the worker dies in between."""
    params = SamplingParams(max_tokens=40, temperature=0, logprobs=3)
    request = GenerateRequest("r", chats[0], params, 300.0)
    expected = undisturbed(make_engine, request)
    assert expected["r"].answers[0].finish_reason == "stop"
    lost: list[str] = []

    def is_finish(frame: FromWorker) -> bool:
        if lost or not isinstance(frame.body, Output) or frame.body.items[0].finish_reason is None:
            return False
        lost.append(frame.worker_id)
        return True

    def kill_who_finished(cluster: InProcessCluster) -> None:
        if lost and lost[0] in cluster.workers:
            cluster.kill(lost[0])

    with two_and_two(make_engine) as cluster:
        cluster.lose(is_finish)
        found = cluster.run([request], each_turn=kill_who_finished)
    assert lost
    assert found["r"].resumed == 1
    assert_exact(found, expected)


def test_finish_lost_when_every_token_is_there_needs_no_other_worker(
    make_engine: MakeEngine, request_of: Callable[[SamplingParams], GenerateRequest]
) -> None:
    """The last token comes alone, and the word "length" behind it never does."""
    request = request_of(GREEDY)
    held: list[FromWorker] = []

    def hold_the_end(frame: FromWorker) -> bool:
        is_end = isinstance(frame.body, Output) and frame.body.items[0].finish_reason is not None
        if is_end:
            held.append(frame)
        return is_end

    def pass_the_token_on(cluster: InProcessCluster) -> None:
        for frame in held:
            assert isinstance(frame.body, Output)
            item = msgspec.structs.replace(frame.body.items[0], finish_reason=None)
            cluster.deliver(FromWorker(frame.worker_id, frame.epoch, Output([item])))
            cluster.kill(frame.worker_id)
        held.clear()

    with one_and_one(make_engine) as cluster:
        cluster.lose(hold_the_end)
        found = cluster.run([request], each_turn=pass_the_token_on)
        assert "decode-0" not in cluster.workers
    assert (found["r"].attempts, found["r"].resumed) == (1, 0)
    assert_exact(found, undisturbed(make_engine, request))
