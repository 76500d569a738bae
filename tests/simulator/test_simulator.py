"""The trace simulator: loaders, costs on paper, each request once, the same figures for the same seed."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError
from penstock.core.quantiles import quantile
from penstock.simulator.cluster import Shape, TraceCluster
from penstock.simulator.costs import MODELS, WorkerCosts
from penstock.simulator.prefix_cache import PrefixCache
from penstock.simulator.report import Targets, summarize
from penstock.simulator.runs import POLICIES, router_config, simulate
from penstock.simulator.trace import TraceRequest, load_trace, shape_trace

TARGETS = Targets(30.0, 0.1)
# Chosen so that sums can be done in the head: a step 10 ms, a prompt token 1 ms, a hand-off 50 ms.
PLAIN = WorkerCosts(0.01, 0.0, 0.0, 0.0, 0.001, 0.0, 1000, 1 << 20, 1000, 1e12, 0.05)


def requests(count: int, *, gap_s: float = 0.2, tokens: int = 1500, output: int = 40) -> list[TraceRequest]:
    """Conversations of three turns: each begins with the blocks of the last."""
    made = []
    for number in range(count):
        talk, turn = divmod(number, 3)
        length = tokens + 512 * turn
        ids = tuple(1000 * talk + block for block in range(-(-length // 512)))
        made.append(TraceRequest(number * gap_s, length, output + number % 7, ids))
    return made


def journeys_of(trace, shape, policy="least-loaded", costs=PLAIN, seed=0):
    cluster = TraceCluster(shape, costs, router_config(policy, TARGETS), seed)
    return cluster, cluster.run(trace)


# ---- traces


def test_mooncake_rows_are_read_and_those_of_one_instant_are_spread(tmp_path: Path) -> None:
    rows = [(1000, 600, 5, [1, 2]), (1000, 512, 6, [3]), (4000, 1, 7, [4])]
    lines = [json.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": h}) for t, i, o, h in rows]
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    trace = load_trace(path)
    assert [r.arrival_s for r in trace] == [0.0, 1.5, 3.0]
    assert [(r.num_prompt_tokens, r.num_output_tokens, r.prefix_ids) for r in trace] == [
        (600, 5, (1, 2)),
        (512, 6, (3,)),
        (1, 7, (4,)),
    ]
    assert [r.arrival_s for r in shape_trace(trace, 2.0, 2)] == [0.0, 0.75]


def test_azure_rows_are_read_and_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:47.1805900,1030,9\n2023-11-16 18:15:48.0000000,5,0\n"
    )
    first, second = load_trace(path)
    assert (first.num_prompt_tokens, first.num_output_tokens) == (374, 44)
    assert second.arrival_s == pytest.approx(0.5)
    assert len(second.prefix_ids) == 3
    assert not set(first.prefix_ids) & set(second.prefix_ids)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no requests"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1]}', "line 1.*need 2 hash_ids"),
        ('{"timestamp": 0, "input_length": "x", "output_length": 5, "hash_ids": [1]}', "line 1.*input_length"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,a,44", "line 2"),
        ("a,b\n1,2", "line 2.*expected TIMESTAMP"),
    ],
)
def test_bad_traces_are_refused_with_their_line(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        load_trace(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_trace(tmp_path / "absent")


def test_prompts_share_exactly_the_blocks_that_the_trace_says() -> None:
    one, two = TraceRequest(0, 1300, 1, (1, 2, 3)), TraceRequest(0, 1300, 1, (1, 2, 9))
    first, second = one.prompt_ids(), two.prompt_ids()
    assert len(first) == len(second) == 1300
    assert [a == b for a, b in zip(first, second, strict=True)].index(False) == 1024


def test_real_traces_load(shared_data) -> None:
    assert len(load_trace(shared_data("mooncake") / "conversation_trace.jsonl.gz")) == 12_031
    azure = load_trace(shared_data("azure-llm-2023") / "AzureLLMInferenceTrace_conv.csv.gz")
    assert len(azure) == 19_366


# ---- by hand


def test_one_request_handed_over_by_hand() -> None:
    _, (journey,) = journeys_of([TraceRequest(1.0, 2000, 11, (1, 2, 3, 4))], Shape(1, 1))
    assert journey.ttft_s == pytest.approx(2.0 + 0.05 + 0.05 * 2e6 / 1e12)
    assert journey.tpot_s == pytest.approx(0.01)
    assert (journey.num_tokens, journey.error) == (11, "")


def test_one_request_where_it_decodes_by_hand() -> None:
    _, (journey,) = journeys_of([TraceRequest(1.0, 2000, 11, (1, 2, 3, 4))], Shape(num_both=1))
    assert journey.ttft_s == pytest.approx(2.0)
    assert journey.tpot_s == pytest.approx(0.01)


def test_two_prompts_wait_for_each_other_by_hand() -> None:
    trace = [TraceRequest(0.0, 1000, 2, (1, 2)), TraceRequest(0.5, 1000, 2, (8, 9))]
    _, (first, second) = journeys_of(trace, Shape(1, 1))
    wire_s = 0.05 + 0.05 * 1e6 / 1e12
    assert (first.ttft_s, second.ttft_s) == (pytest.approx(1.0 + wire_s), pytest.approx(1.5 + wire_s))


def test_stream_waits_for_the_chunks_beside_it_by_hand() -> None:
    """100 tokens of 10 ms; a prompt of two chunks comes at 0.2 s: 1.01 s each, and a token with each."""
    trace = [TraceRequest(0.0, 100, 101, (1,)), TraceRequest(0.5, 2000, 1, (5, 6, 7, 8))]
    _, (stream, prompt) = journeys_of(trace, Shape(num_both=1))
    assert stream.ttft_s == pytest.approx(0.1)
    assert stream.end_s == pytest.approx(0.1 + 100 * 0.01 + 2 * 1.0)
    assert prompt.ttft_s == pytest.approx(2 * 1.01, abs=0.011)


def test_second_turn_computes_only_what_is_new_by_hand() -> None:
    trace = [TraceRequest(0.0, 1024, 1, (1, 2)), TraceRequest(10.0, 1536, 1, (1, 2, 3))]
    cluster, (first, second) = journeys_of(trace, Shape(num_both=1))
    assert (first.num_cached, second.num_cached) == (0, 1024)
    assert second.ttft_s == pytest.approx(0.512)
    summary = summarize("x", "1B", [first, second], Targets(1.0, 1.0))
    assert summary.hit_rate == pytest.approx(1024 / 2560)
    assert summary.goodput == 0.5  # the first took 1.024 s
    assert summary.ttft_p50_s == pytest.approx(0.512)
    assert summary.ttft_p99_s == pytest.approx(1.024)
    cluster.core.check_invariants()


def test_prefix_cache_drops_tails_first() -> None:
    cache = PrefixCache()
    cache.add((1, 2, 3), 10)
    cache.add((7, 8), 4)
    assert (cache.match((1, 2, 3)), cache.match((7, 8)), cache.match((2,)), len(cache)) == (2, 2, 1, 4)
    cache.add((9,), 0)
    assert len(cache) == 0


def test_percentiles_are_values_that_occurred() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.51, 0.99)] == [1, 1, 2, 3, 4]
    assert quantile([], 0.5) == 0.0


# ---- whole runs


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [Shape(2, 2), Shape(num_both=3), Shape(1, 2)])
def test_every_request_is_answered_once_and_whole(policy: str, shape: Shape) -> None:
    trace = requests(45)
    summary = simulate(trace, policy, shape, MODELS["8b"], TARGETS, 3)
    assert (summary.num_requests, summary.num_failed) == (45, 0)
    assert 0 <= summary.hit_rate < 1
    if shape.num_both:
        assert summary.local_rate == 1


@pytest.mark.parametrize("policy", ["auto", "random"])
def test_nothing_is_left_behind_and_every_token_came(policy: str) -> None:
    trace = requests(60, gap_s=0.05)
    cluster, journeys = journeys_of(trace, Shape(2, 2), policy, MODELS["8b"])
    assert [journey.num_tokens for journey in journeys] == [request.num_output_tokens for request in trace]
    cluster.core.check_invariants()
    assert cluster.core.counters.ended == cluster.core.counters.accepted == 60
    assert cluster.core.counters.retries == 0
    assert all(worker.load().running == worker.load().waiting == 0 for worker in cluster.workers.values())
    assert all(worker.load().free_blocks == worker.load().total_blocks for worker in cluster.workers.values())


@pytest.mark.parametrize("policy", ["auto", "random", "power-of-two", "sglang"])
def test_same_seed_same_figures(policy: str) -> None:
    trace = requests(60, gap_s=0.1)
    first, second = (simulate(trace, policy, Shape(2, 2), MODELS["8b"], TARGETS, 5) for _ in range(2))
    assert first == second


def test_another_seed_moves_what_is_drawn() -> None:
    trace = requests(60, gap_s=0.1)
    assert simulate(trace, "random", Shape(3, 3), MODELS["8b"], TARGETS, 1) != simulate(
        trace, "random", Shape(3, 3), MODELS["8b"], TARGETS, 2
    )


def test_small_memory_makes_requests_wait_and_loses_none() -> None:
    costs = replace(MODELS["8b"], kv_tokens=8192)
    trace = requests(40, gap_s=0.01)
    summary = simulate(trace, "auto", Shape(1, 1), costs, TARGETS, 0)
    assert (summary.num_requests, summary.num_failed) == (40, 0)


def test_request_that_no_worker_could_hold_is_named() -> None:
    with pytest.raises(ConfigError, match="needs 5048 tokens, a worker holds 4096"):
        simulate(
            [TraceRequest(0, 3000, 5, (1, 2, 3, 4, 5, 6))],
            "auto",
            Shape(1, 1),
            replace(PLAIN, kv_tokens=4096),
            TARGETS,
            0,
        )
    with pytest.raises(ConfigError, match="choose from"):
        router_config("astrology", TARGETS)


def test_auto_alone_is_as_fast_as_colocated() -> None:
    """One request at a time on an idle cluster: nothing may be lost by having prefill workers."""
    trace = requests(30, gap_s=60.0)
    colocated = simulate(trace, "kv-overlap", Shape(num_both=2), MODELS["8b-slow-link"], TARGETS, 0)
    auto = simulate(trace, "auto", Shape(2, 2), MODELS["8b-slow-link"], TARGETS, 0)
    assert auto.ttft_mean_s <= 1.05 * colocated.ttft_mean_s


def test_auto_is_better_than_fixed_policies_under_load() -> None:
    trace = requests(240, gap_s=0.03, tokens=6000, output=150)
    rows = {p: simulate(trace, p, Shape(2, 2), MODELS["8b"], TARGETS, 0) for p in ("auto", "least-loaded", "random")}
    best = min(rows["least-loaded"].ttft_mean_s, rows["random"].ttft_mean_s)
    assert rows["auto"].ttft_mean_s < best


def test_forecasts_become_good() -> None:
    trace = requests(300, gap_s=0.4)
    _, journeys = journeys_of(trace, Shape(2, 2), "auto", MODELS["8b"])
    late = summarize("auto", "", journeys[150:], TARGETS)
    assert late.ttft_forecast_error < 0.2
    assert late.tpot_forecast_error < 0.1


# ---- shared cores


def test_neighbours_slow_each_other_down_by_hand() -> None:
    """Two chunks of a prompt beside a stream of 100 tokens of 10 ms: what begins beside other work takes double."""
    trace = [TraceRequest(0.0, 100, 101, (1,)), TraceRequest(0.5, 2000, 1, (5, 6, 7, 8))]
    alone, shared = (
        TraceCluster(Shape(1, 1), PLAIN, router_config("least-loaded", TARGETS), slowdown=factor)
        for factor in (1.0, 2.0)
    )
    (_, first), (stream, second) = alone.run(trace), shared.run(trace)
    assert first.ttft_s == pytest.approx(2.05, abs=0.01)
    # Its first chunk takes 2 s; the stream's last 70 tokens take 1.4 s of them, and the second chunk is alone.
    assert second.ttft_s == pytest.approx(2.0 + 1.0 + 0.05, abs=0.03)
    assert stream.end_s == pytest.approx(0.15 + 0.35 + 1.3, abs=0.1)


def test_router_learns_that_a_prefill_worker_on_the_same_cores_is_no_faster() -> None:
    trace = requests(400, gap_s=0.4, tokens=1200, output=150)
    costs = MODELS["8b"]
    cluster = TraceCluster(Shape(1, 1), costs, router_config("auto", TARGETS), slowdown=2.0)
    cluster.run(trace)
    model = cluster.core._life.placer.model
    assert model.neighbour_stall == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("slowdown", [1.0, 2.0])
def test_one_request_at_a_time_is_answered_as_soon_as_by_a_colocated_worker(slowdown: float) -> None:
    trace = [TraceRequest(6.0 * n, 700 + 97 * (n % 13), 200, tuple(range(9 * n, 9 * n + 4))) for n in range(200)]
    split = simulate(trace, "auto", Shape(1, 1), MODELS["8b"], TARGETS, 0, slowdown)
    colocated = simulate(trace, "auto", Shape(num_both=1), MODELS["8b"], TARGETS, 0)
    assert split.ttft_mean_s <= 1.05 * colocated.ttft_mean_s
    assert split.ttft_p50_s <= 1.05 * colocated.ttft_p50_s
    assert split.local_rate < 1  # the other way has been tried
