"""What the load test reports is what the scripted server knows it has done: to the nanosecond, on virtual time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from penstock.core.errors import ConfigError
from penstock.gateway.explain import report
from penstock.loadtest.bench import Choice, ProbeSize, Task
from penstock.loadtest.choices import ArrivalChoice, Sizes, WorkloadChoice
from penstock.loadtest.documents import as_json
from penstock.loadtest.lengths import Lengths
from penstock.loadtest.metrics import Targets
from penstock.loadtest.report import as_html
from penstock.loadtest.search import Limits
from penstock.loadtest.sending import RequestForm
from penstock.loadtest.tables import tables, warnings
from penstock.testing.mock_server import Body, Piece, Script, steady

LoadTest = Callable[..., Any]
EXACT = 1e-6
NO_WARMUP = 1  # the request that finds out which form the server takes


def choice(**settings: Any) -> Choice:
    given: dict[str, Any] = {
        "workload": WorkloadChoice(count=40, sizes=Sizes(Lengths(20, 60), Lengths(4, 30))),
        "arrivals": ArrivalChoice(rate=8.0),
        "form": RequestForm(""),
        "targets": Targets(ttft_s=0.3, tpot_s=0.05),
        "warmup": 0,
    }
    return Choice(**(given | settings))


def uneven(number: int, body: Body) -> Script:
    """Another TTFT, other gaps and other chunks for each request."""
    pieces = [Piece(0.1 + 0.013 * (number % 7), 1 + number % 3)]
    while (left := int(body["max_tokens"]) - sum(piece.tokens for piece in pieces)) > 0:
        pieces.append(Piece(0.01 * (1 + (number + len(pieces)) % 5), min(left, 1 + len(pieces) % 4)))
    return Script(tuple(pieces), prompt_tokens=len(body["prompt"]), end_s=0.004)


def test_every_moment_is_the_servers_own(load_test: LoadTest) -> None:
    tested = load_test(uneven, choice())
    records = tested.outcome.runs[0].records
    served = sorted(tested.server.served[NO_WARMUP:], key=lambda one: one.received_s)
    began_s = served[0].received_s - records[0].asked.intended_s
    assert len(records) == len(served) == 40
    for record, known in zip(records, served, strict=True):
        assert record.is_completed
        assert record.sent_s + began_s == pytest.approx(known.received_s, abs=EXACT)
        assert [one.at_s + began_s for one in record.arrivals] == pytest.approx(
            [at for at, _ in known.written], abs=EXACT
        )
        assert [one.tokens for one in record.arrivals] == [count for _, count in known.written]
        assert record.first_s == pytest.approx(known.written[0][0] - began_s, abs=EXACT)
        assert record.end_s == pytest.approx((known.ended_s or 0) - began_s, abs=EXACT)
        first, last = known.written[0], known.written[-1]
        later = sum(count for _, count in known.written[1:])
        if later:
            assert record.tpot_s == pytest.approx((last[0] + 0.004 - first[0]) / later, abs=EXACT)
    assert tested.outcome.is_valid


def test_steady_script_has_exactly_its_figures(load_test: LoadTest) -> None:
    script = lambda _, body: steady(0.25, 0.02, int(body["max_tokens"]), cached_tokens=4, accepted=3, rejected=1)  # noqa: E731
    summary = load_test(script, choice(workload=WorkloadChoice(count=50))).outcome.runs[0].summary
    assert summary.latencies.ttft.mean == pytest.approx(0.25, abs=EXACT)
    assert summary.latencies.ttft.std == pytest.approx(0.0, abs=EXACT)
    assert summary.latencies.tpot.percentiles[99] == pytest.approx(0.02, abs=EXACT)
    assert summary.latencies.itl.greatest == pytest.approx(0.02, abs=EXACT)
    assert summary.latencies.e2e.mean == pytest.approx(0.25 + 127 * 0.02, abs=EXACT)
    assert summary.goodput is not None
    assert summary.goodput.attainment == 1.0
    assert summary.counts.cached_share == pytest.approx(0.4)
    assert summary.counts.acceptance == pytest.approx(0.75)
    assert summary.counts.has_chunk_tokens
    assert summary.throughput.output_tokens == 50 * 128


def test_tokens_in_chunks_of_three_have_the_same_tpot_and_other_gaps(load_test: LoadTest) -> None:
    script = lambda _, body: steady(0.25, 0.02, 31, tokens_each=3)  # noqa: E731
    summary = load_test(script, choice()).outcome.runs[0].summary
    assert summary.latencies.tpot.mean == pytest.approx(0.02, abs=EXACT)
    assert summary.latencies.itl.median == pytest.approx(0.06, abs=EXACT)
    assert summary.counts.tokens_per_chunk == pytest.approx(31 / 11)


def test_server_without_chunk_usage_is_asked_without_it(load_test: LoadTest) -> None:
    script = lambda _, body: steady(0.1, 0.02, 30, tokens_each=3)  # noqa: E731
    tested = load_test(script, choice(), takes_chunk_usage=False)
    summary = tested.outcome.runs[0].summary
    assert all("continuous_usage_stats" not in one.body["stream_options"] for one in tested.server.served)
    assert not summary.counts.has_chunk_tokens
    assert summary.throughput.output_tokens == 40 * 30
    assert summary.latencies.tpot.mean == pytest.approx(0.02 * 27 / 29, abs=EXACT)  # the first chunk counts as one


def test_server_without_usage_is_counted_by_chunks_and_said_so(load_test: LoadTest) -> None:
    tested = load_test(lambda *_: steady(0.1, 0.02, 10, has_usage=False), choice())
    counts = tested.outcome.runs[0].summary.counts
    assert counts.num_counted_by_chunks == 40
    assert tested.outcome.runs[0].summary.throughput.output_tokens == 400


def broken(number: int, _: Body) -> Script:
    whole = steady(0.1, 0.02, 5)
    kinds = {
        1: Script(status=429),
        2: Script(status=500),
        3: Script(status=503),
        4: Script(status=400),
        5: Script(whole.pieces, cut_after=2),
        6: Script(whole.pieces, error_after=3),
        7: Script(()),
        8: Script((Piece(100.0),)),
        9: Script(whole.pieces, cut_after=0),
    }
    return kinds.get(number, whole)


def test_errors_are_told_apart_and_none_is_good(load_test: LoadTest) -> None:
    tested = load_test(broken, choice(workload=WorkloadChoice(count=12)), timeout_s=30.0)
    summary = tested.outcome.runs[0].summary
    assert summary.errors == {
        "bad_request": 1,
        "broken_stream": 3,
        "empty": 1,
        "refused": 1,
        "server_error": 2,
        "timeout": 1,
    }
    assert summary.goodput is not None
    assert (summary.goodput.good, summary.goodput.sent) == (3, 12)
    assert summary.latencies.ttft.num == 3


def test_stalled_server_is_not_spared(load_test: LoadTest) -> None:
    """Open loop: one slot that is held for a second a request. Arrivals go on, and waiting counts."""
    arrivals = ArrivalChoice("constant", rate=2.0)
    tested = load_test(
        lambda *_: steady(0.0, 0.0, 1),
        choice(workload=WorkloadChoice(count=50), arrivals=arrivals),
        slots=1,
        service_s=1.0,
    )
    summary = tested.outcome.runs[0].summary
    ttfts = [record.ttft_s for record in tested.outcome.runs[0].records]
    assert ttfts == pytest.approx([1.0 + 0.5 * n for n in range(50)], abs=EXACT)
    assert summary.is_saturated
    assert summary.is_valid  # the server was slow, not the client


def test_closed_loop_spares_it_and_keeps_its_concurrency(load_test: LoadTest) -> None:
    arrivals = ArrivalChoice("closed", concurrency=3)
    tested = load_test(lambda *_: steady(0.0, 0.0, 1), choice(arrivals=arrivals), slots=1, service_s=1.0)
    summary = tested.outcome.runs[0].summary
    assert summary.latencies.ttft.median == pytest.approx(3.0, abs=EXACT)
    assert summary.peak_concurrency == 3
    assert not summary.is_saturated


def test_closed_loop_begins_nothing_after_its_duration(load_test: LoadTest) -> None:
    arrivals = ArrivalChoice("closed", concurrency=2, duration_s=3.5)
    tested = load_test(lambda *_: steady(1.0, 0.0, 1), choice(arrivals=arrivals))
    assert tested.outcome.runs[0].summary.sent == 8


async def sluggish(delay_s: float) -> None:
    await asyncio.sleep(delay_s + 0.04)


def test_client_that_sends_late_is_invalid_and_its_latency_counts_from_the_schedule(load_test: LoadTest) -> None:
    script = lambda *_: steady(0.25, 0.02, 5)  # noqa: E731
    tested = load_test(script, choice(), sleep=sluggish)
    run = tested.outcome.runs[0]
    assert not run.summary.is_valid
    assert not tested.outcome.is_valid
    assert "sent requests" in run.summary.client.why_invalid()
    assert run.summary.client.lag_p50_s == pytest.approx(0.04, abs=EXACT)
    assert run.summary.latencies.ttft.median == pytest.approx(0.29, abs=EXACT)
    assert run.summary.latencies.service_ttft.median == pytest.approx(0.25, abs=EXACT)


def test_lateness_within_a_given_bound_is_valid(load_test: LoadTest) -> None:
    tested = load_test(lambda *_: steady(0.25, 0.02, 5), choice(max_lag_s=0.05), sleep=sluggish)
    assert tested.outcome.is_valid


def test_prompts_of_a_chat_have_the_servers_tokens(load_test: LoadTest) -> None:
    """Five tokens for every four words and a template of 20: calibrated from two requests."""

    def script(_: int, body: Body) -> Script:
        words = sum(len(message["content"].split()) for message in body["messages"])
        return steady(0.1, 0.01, 3, prompt_tokens=round(1.25 * words) + 20)

    sizes = Sizes(Lengths(200, 300), Lengths(3, 3))
    tested = load_test(
        script, choice(workload=WorkloadChoice(count=20, sizes=sizes), form=RequestForm("", "chat", False))
    )
    for record in tested.outcome.runs[0].records:
        assert record.use.prompt_tokens == pytest.approx(record.asked.prompt_tokens, abs=1)


def test_conversation_sends_what_was_said_and_thinks_between(load_test: LoadTest) -> None:
    sizes = Sizes(Lengths(10, 10), Lengths(2, 2), turns=Lengths(3, 3), think_s=5.0, is_aged=False)
    tested = load_test(
        lambda *_: steady(0.1, 0.1, 2),
        choice(workload=WorkloadChoice("chat", count=2, sizes=sizes), form=RequestForm("", "chat", False)),
    )
    by_turn = [record for record in tested.outcome.runs[0].records if record.asked.number == 0]
    assert [record.asked.turn for record in by_turn] == [0, 1, 2]
    ends = [record.end_s for record in by_turn]
    assert [record.asked.intended_s for record in by_turn[1:]] == pytest.approx(
        [end + 5.0 for end in ends[:2]], abs=EXACT
    )
    last = max((one.body["messages"] for one in tested.server.served[3:]), key=len)
    assert [message["role"] for message in last] == ["user", "assistant", "user", "assistant", "user"]
    assert last[1]["content"] == last[3]["content"] == " word word"


def test_failed_turn_ends_its_conversation(load_test: LoadTest) -> None:
    sizes = Sizes(Lengths(10, 10), Lengths(2, 2), turns=Lengths(3, 3), is_aged=False)
    script = lambda number, _: Script(status=500) if number == 4 else steady(0.1, 0.1, 2)  # noqa: E731
    tested = load_test(
        script, choice(workload=WorkloadChoice("chat", count=1, sizes=sizes), form=RequestForm("", "chat", False))
    )
    assert [record.is_completed for record in tested.outcome.runs[0].records] == [True, False]


def test_conversations_to_completions_are_refused(load_test: LoadTest) -> None:
    with pytest.raises(ConfigError, match="need chat"):
        load_test(lambda *_: steady(0.1, 0.1, 2), choice(workload=WorkloadChoice("chat", count=5)))


def test_warm_up_is_of_the_same_lengths_and_other_words_and_in_no_figure(load_test: LoadTest) -> None:
    tested = load_test(lambda *_: steady(0.1, 0.01, 3), choice(warmup=5))
    warm, real = tested.server.served[1:6], tested.server.served[6:]
    assert tested.outcome.runs[0].summary.sent == len(real) == 40
    assert [len(one.body["prompt"]) for one in warm] == [len(one.body["prompt"]) for one in real[:5]]
    assert not {tuple(one.body["prompt"][:4]) for one in warm} & {tuple(one.body["prompt"][:4]) for one in real}


def test_lengths_keep_to_the_window_that_the_server_names(load_test: LoadTest) -> None:
    sizes = Sizes(Lengths(90, 200), Lengths(20, 20))
    tested = load_test(
        lambda *_: steady(0.1, 0.01, 3), choice(workload=WorkloadChoice(count=30, sizes=sizes)), max_model_len=120
    )
    bodies = [one.body for one in tested.server.served[1:]]
    assert max(len(body["prompt"]) + body["max_tokens"] for body in bodies) == 120
    assert tested.outcome.runs[0].workload.num_clipped > 0


def test_bodies_say_what_a_load_test_needs(load_test: LoadTest) -> None:
    form = RequestForm("", extra={"top_p": 0.5})
    body = load_test(lambda *_: steady(0.1, 0.01, 3), choice(form=form)).server.served[-1].body
    assert (body["model"], body["stream"], body["ignore_eos"], body["temperature"]) == ("mock", True, True, 0.0)
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert body["top_p"] == 0.5


def test_server_is_never_told_to_ignore_the_end_where_that_is_not_wanted(load_test: LoadTest) -> None:
    free = WorkloadChoice(count=5, is_exact_length=False)
    tested = load_test(lambda *_: steady(0.1, 0.01, 3), choice(workload=free, warmup=1))
    assert len(tested.server.served) == 7
    assert not any("ignore_eos" in one.body for one in tested.server.served)


def test_same_seed_sends_the_same_requests_at_the_same_times(load_test: LoadTest) -> None:
    script = lambda *_: steady(0.1, 0.01, 3)  # noqa: E731
    one, same, other = (load_test(script, choice(seed=seed)) for seed in (1, 1, 2))
    bodies = [[served.body for served in tested.server.served] for tested in (one, same, other)]
    times = [[record.asked.intended_s for record in tested.outcome.runs[0].records] for tested in (one, same, other)]
    assert bodies[0] == bodies[1] != bodies[2]
    assert times[0] == times[1] != times[2]


def test_cache_is_reset_before_the_run_where_asked(load_test: LoadTest) -> None:
    assert load_test(lambda *_: steady(0.1, 0.01, 3), choice(is_resetting_cache=True)).server.num_resets == 1


def test_duration_cuts_the_arrivals(load_test: LoadTest) -> None:
    arrivals = ArrivalChoice("constant", rate=10.0, duration_s=2.05)
    assert load_test(lambda *_: steady(0.1, 0.01, 3), choice(arrivals=arrivals)).outcome.runs[0].summary.sent == 21


def test_search_finds_the_servers_capacity(load_test: LoadTest) -> None:
    """Four slots of half a second: 8 requests a second; with Poisson arrivals the target is kept somewhat below."""
    task = Task(("http://server-0",), (0.9, 0.99), Limits(1.0, precision=1.1), ProbeSize(60.0, 100, 600))
    targets = Targets(ttft_s=1.0)
    tested = load_test(lambda *_: steady(0.0, 0.0, 1), choice(targets=targets), task, slots=4, service_s=0.5)
    loose, strict = sorted(tested.outcome.found, key=lambda one: one.share)
    assert 5.0 < strict.rate <= loose.rate < 8.0
    met = [run for run in tested.outcome.runs if run.rate == loose.rate]
    assert all(run.summary.goodput is not None and run.summary.goodput.attainment >= 0.85 for run in met)
    above = [run for run in tested.outcome.runs if run.rate >= 8.0]
    assert above
    assert all(run.summary.goodput is not None and run.summary.goodput.attainment < 0.9 for run in above)


def test_hopeless_probe_is_given_up_as_soon_as_it_is_lost(load_test: LoadTest) -> None:
    """One request a second can be served; at 32 a second 960 would take a quarter of an hour."""
    task = Task(("http://server-0",), (0.9, 0.5), Limits(32.0, max_probes=1), ProbeSize(30.0, 100, 2000))
    tested = load_test(
        lambda *_: steady(0.0, 0.0, 1), choice(targets=Targets(ttft_s=3.5)), task, slots=1, service_s=1.0
    )
    summary = tested.outcome.runs[0].summary
    assert summary.goodput is not None
    assert summary.goodput.good == 3
    assert summary.goodput.sent == 960
    assert summary.errors == {"given_up": summary.sent - summary.throughput.completed}
    assert summary.throughput.completed == 3 + 481  # more than half of those planned have missed: lost for 0.5 too
    assert summary.throughput.duration_s < 500


def test_client_goes_on_after_a_probe_was_given_up(load_test: LoadTest) -> None:
    task = Task(("http://server-0",), (0.9,), Limits(8.0, precision=1.5), ProbeSize(30.0, 60, 600))
    tested = load_test(
        lambda *_: steady(0.0, 0.0, 1), choice(targets=Targets(ttft_s=3.0)), task, slots=1, service_s=1.0
    )
    assert "given_up" in tested.outcome.runs[0].summary.errors
    assert tested.outcome.runs[-1].summary.errors == {}
    assert 0.3 < tested.outcome.found[0].rate < 1.0


def test_runs_of_a_search_share_no_prompt(load_test: LoadTest) -> None:
    task = Task(("http://server-0",), (0.9,), Limits(1.0, highest=4.0), ProbeSize(5.0, 10, 20))
    tested = load_test(lambda *_: steady(0.1, 0.01, 3), choice(), task)
    heads = [tuple(one.body["prompt"][:8]) for one in tested.server.served[1:]]
    assert len(tested.outcome.runs) >= 3
    assert len(set(heads)) == len(heads)


def test_slower_server_is_worse_and_an_equal_one_within_noise(load_test: LoadTest) -> None:
    fast = lambda number, _: steady(0.10 + 0.001 * (number % 5), 0.02, 5)  # noqa: E731
    slow = lambda number, _: steady(0.15 + 0.001 * (number % 5), 0.02, 5)  # noqa: E731
    task = Task(("http://server-0", "http://server-1", "http://server-2"), num_rounds=3)
    tested = load_test([fast, slow, fast], choice(warmup=2), task)
    verdicts = {(one.server, one.figure): one.verdict for one in tested.outcome.compared}
    assert verdicts[1, "TTFT median"] == "worse"
    assert verdicts[1, "TPOT median"] == "within noise"
    assert verdicts[2, "TTFT median"] == "within noise"
    assert len(tested.outcome.runs) == 3 * 4
    assert [run.label.split(", ")[0] for run in tested.outcome.runs[:4]] == ["round 1"] * 4
    again = [run for run in tested.outcome.runs if run.label.endswith("again")]
    assert len(again) == 3


def test_named_model_that_is_not_served_is_refused(load_test: LoadTest) -> None:
    with pytest.raises(ConfigError, match=r"--model: 'llama' is not served; .* has mock"):
        load_test(lambda *_: steady(0.1, 0.1, 2), choice(form=RequestForm("llama")))


def test_server_that_fails_from_the_start_is_refused(load_test: LoadTest) -> None:
    with pytest.raises(ConfigError, match="did not answer a request for two tokens: scripted 500"):
        load_test(lambda *_: Script(status=500), choice())


def test_interrupted_run_reports_what_had_ended_and_sends_nothing_more(load_test: LoadTest) -> None:
    tested = load_test(lambda *_: steady(0.25, 0.1, 30), choice(), interrupt_after=10)
    run = tested.outcome.runs[0]
    assert tested.outcome.is_interrupted
    assert run.summary.sent == 10
    assert run.num_cut_off > 0
    assert not run.summary.errors
    assert len(tested.server.served) - NO_WARMUP == 10 + run.num_cut_off < 40
    assert run.summary.goodput is not None
    assert run.summary.goodput.sent == 10
    assert warnings(tested.outcome)[0].startswith("INTERRUPTED: of the last run's 40 requests 10 had ended")


def test_interrupted_comparison_begins_no_other_run(load_test: LoadTest) -> None:
    scripts = [lambda *_: steady(0.1, 0.02, 10)] * 2
    outcome = load_test(scripts, choice(), interrupt_after=5).outcome
    assert [run.summary.sent for run in outcome.runs] == [5]
    assert not outcome.compared
    assert len(tables(outcome)) > 0


def test_interrupted_search_names_no_rate(load_test: LoadTest) -> None:
    task = Task(("http://server-0",), (0.9,), Limits(start=4.0), ProbeSize(10.0, 20))
    outcome = load_test(lambda *_: steady(0.1, 0.02, 10), choice(), task, interrupt_after=5).outcome
    assert [run.summary.sent for run in outcome.runs] == [5]
    assert not outcome.found
    assert len(tables(outcome)) > 0


def test_search_takes_turns_among_servers(load_test: LoadTest) -> None:
    scripts = [lambda *_: steady(0.1, 0.0, 1), lambda *_: steady(2.0, 0.0, 1)]
    limits = Limits(start=2.0, lowest=1.0, highest=8.0)
    task = Task(("http://server-0", "http://server-1"), (0.9,), limits, ProbeSize(4.0, 8))
    outcome = load_test(scripts, choice(targets=Targets(ttft_s=0.3)), task).outcome
    assert [(one.server, one.rate) for one in outcome.found] == [(0, 8.0), (1, 0.0)]
    urls = [run.target.url for run in outcome.runs[:4]]
    assert urls == ["http://server-0", "http://server-1"] * 2
    assert tables(outcome)[0].rows == [
        ("requests that keep them", "server", "requests per s"),
        ("≥ 90%", "http://server-0", "8.000"),
        ("≥ 90%", "http://server-1", "none found"),
    ]


def explanation() -> Body:
    """What a gateway says when prefill is the bottleneck, in its own structs."""
    quantiles = report.Quantiles(100.0, 200.0, 300.0, 120.0)
    latency = report.Latency(40, quantiles, [report.PartRow("prefill_queue", quantiles, report.Quantiles(1.0, 1.0))])
    why = report.Bottleneck("prefill", "Prompts wait for prefill.", ["prefill-0 is busy 98 % of the time"])
    what_if = report.WhatIf("", [report.Change("+1 prefill worker", -0.3, -0.38, -0.4)])
    said = report.Explanation(1.0, 40, 8.0, 0, 0.0, 0, latency, latency, [], report.Pipe(), why, why, what_if)
    return {key: value for key, value in msgspec.to_builtins(said).items() if key != "window_s"}


def test_server_that_explains_itself_is_quoted_in_the_report(load_test: LoadTest) -> None:
    outcome = load_test(lambda *_: steady(0.1, 0.02, 10), choice(), explanation=explanation()).outcome
    run = outcome.runs[0]
    assert run.explained is not None
    assert run.explained.window_s == pytest.approx(run.summary.throughput.duration_s, abs=0.06)
    first, between, changes = tables(outcome)[-3:]
    assert ("prefill_queue", "100.0", "200.0", "300.0", "120.0", "100%") in first.rows
    assert "bottleneck: prefill. Prompts wait for prefill." in first.notes
    assert between.title == "the server on its time between two tokens"
    assert ("+1 prefill worker", "-38%", "-") in changes.rows
    assert json.loads(as_json(outcome, "20261231-235959"))["penstock"]["explain"]["bottleneck"]["name"] == "prefill"
    assert "+1 prefill worker" in as_html(outcome, "20261231-235959")


@pytest.mark.parametrize("said", [None, {"window_s": "soon"}, {"ttft": []}])
def test_server_that_does_not_is_left_alone(load_test: LoadTest, said: Body | None) -> None:
    outcome = load_test(lambda *_: steady(0.1, 0.02, 10), choice(), explanation=said).outcome
    assert outcome.runs[0].explained is None
    assert outcome.is_valid
