"""Exact resume, on the real model in float32: whatever is lost at whatever token, the stream goes on as if nothing had
been. Tokens, finish reasons and the ids of the most likely tokens are compared exactly, logprobs within
LOGPROB_TOLERANCE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from penstock.gateway.choice import Choice
from penstock.gateway.requests import AnswerOptions
from penstock.models.tokenizer import Tokenizer
from penstock.protocol.messages import FromWorker, Output, SampledToken
from penstock.protocol.sampling import SamplingParams
from penstock.router.config import RouterConfig
from penstock.router.interface import GenerateRequest, TokensEvent
from penstock.testing.inprocess import PATIENCE_S, InProcessCluster, Result

from .conftest import MakeEngine

LOGPROB_TOLERANCE = 1e-3
NUM_TOKENS = 10
ROUTER = RouterConfig(
    policy="prefix-affinity", worker_timeout_s=PATIENCE_S, unacknowledged_s=PATIENCE_S, unavailable_s=PATIENCE_S
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, logprobs=3, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.9, top_p=0.95, top_k=50, seed=11, logprobs=3)
KINDS = {
    "greedy": GREEDY,
    "seeded": msgspec.structs.replace(SEEDED, ignore_eos=True),
    "penalties": SamplingParams(
        max_tokens=NUM_TOKENS,
        temperature=0.7,
        seed=3,
        repetition_penalty=1.3,
        frequency_penalty=0.6,
        presence_penalty=0.4,
        logprobs=3,
        ignore_eos=True,
    ),
    "min_tokens": SamplingParams(max_tokens=NUM_TOKENS, temperature=1.2, seed=9, min_tokens=7, logprobs=3),
    "n=3": SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, n=3, seed=8, logprobs=3, ignore_eos=True),
}
AtTurn = Callable[[InProcessCluster], None]


@dataclass
class Fault:
    """Does `action` once, when the request has got `index` tokens."""

    index: int
    action: AtTurn
    happened_at: int | None = field(default=None, init=False)  # tokens the caller had then

    def __call__(self, cluster: InProcessCluster) -> None:
        num_tokens = sum(result.num_tokens for result in cluster.results.values())
        if self.happened_at is None and num_tokens >= self.index:
            self.happened_at = num_tokens
            self.action(cluster)


def each_of(faults: list[Fault]) -> AtTurn:
    def at_turn(cluster: InProcessCluster) -> None:
        for fault in faults:
            fault(cluster)

    return at_turn


def holder(cluster: InProcessCluster, role: str) -> str:
    """The worker of this role that works on the one request, or holds its attempt."""
    rows = [row for row in cluster.router.status().workers if row.worker_id.startswith(role) and row.num_attempts]
    assert len(rows) == 1, f"one {role} worker has the request, found {[row.worker_id for row in rows]}"
    return rows[0].worker_id


def assert_exact(found: dict[str, Result], expected: dict[str, Result]) -> None:
    for request_id, result in expected.items():
        assert found[request_id].error is None
        for ours, theirs in zip(found[request_id].answers, result.answers, strict=True):
            assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
            for a, b in zip(ours.tokens, theirs.tokens, strict=True):
                assert_same_logprobs(a, b)


def assert_same_logprobs(a: SampledToken, b: SampledToken) -> None:
    assert a.logprob is not None
    assert b.logprob is not None
    assert abs(a.logprob.logprob - b.logprob.logprob) < LOGPROB_TOLERANCE
    assert [token_id for token_id, _ in a.logprob.top] == [token_id for token_id, _ in b.logprob.top]
    for (_, ours), (_, theirs) in zip(a.logprob.top, b.logprob.top, strict=True):
        assert abs(ours - theirs) < LOGPROB_TOLERANCE


@pytest.fixture
def request_of(chats: list[list[int]]) -> Callable[[SamplingParams], GenerateRequest]:
    return lambda params: GenerateRequest("r", chats[7], params, 300.0)


@contextmanager
def two_and_two(make_engine: MakeEngine) -> Iterator[InProcessCluster]:
    engines = {name: make_engine(64) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")}
    with InProcessCluster(engines, router=ROUTER) as cluster:
        yield cluster


@contextmanager
def one_and_one(make_engine: MakeEngine) -> Iterator[InProcessCluster]:
    with InProcessCluster({"prefill-0": make_engine(64), "decode-0": make_engine(64)}, router=ROUTER) as cluster:
        yield cluster


@contextmanager
def colocated(make_engine: MakeEngine) -> Iterator[InProcessCluster]:
    with InProcessCluster({"both-0": make_engine(64)}, router=ROUTER) as cluster:
        yield cluster


_undisturbed: dict[bytes, dict[str, Result]] = {}


def undisturbed(make_engine: MakeEngine, request: GenerateRequest) -> dict[str, Result]:
    """What a cluster that nothing happens to answers; computed once for each request."""
    name = msgspec.msgpack.encode(request)
    if name not in _undisturbed:
        with one_and_one(make_engine) as cluster:
            _undisturbed[name] = cluster.run([request])
        assert _undisturbed[name]["r"].attempts == 1
    return _undisturbed[name]


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
