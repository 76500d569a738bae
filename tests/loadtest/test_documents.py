"""Files of an outcome: vLLM's keys, a CSV row a request, one HTML file that is whole and loads nothing."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from penstock.loadtest.bench import Choice, Outcome, ProbeSize, Task
from penstock.loadtest.choices import ArrivalChoice, WorkloadChoice
from penstock.loadtest.documents import COLUMNS, as_csv, as_json
from penstock.loadtest.metrics import Targets
from penstock.loadtest.plots import MAX_POINTS, Axes, Line, bars, cumulative, plot, thinned, ticks
from penstock.loadtest.report import as_html
from penstock.loadtest.search import Limits
from penstock.loadtest.sending import RequestForm
from penstock.loadtest.tables import tables, warnings
from penstock.testing.mock_server import Body, Script, steady

LoadTest = Callable[..., Any]
PHASES = {
    "gateway_ms": 10.0,
    "queue_ms": 40.0,
    "prefill_ms": 150.0,
    "other_ms": 0.0,
    "ttft_ms": 200.0,
    "decode_ms": 80.0,
}
VLLM_KEYS = {
    "date", "backend", "endpoint_type", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness",
    "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests", "input_lens", "output_lens", "ttfts", "itls", "start_times", "errors",
    *(f"{which}_{what}_ms" for which in ("mean", "median", "std", "p99") for what in ("ttft", "tpot", "itl", "e2el")),
}  # fmt: skip


def some_fail(number: int, _: Body) -> Script:
    if number % 10 == 9:
        return Script(status=429)
    return steady(0.25, 0.02, 5, prompt_tokens=8, penstock=PHASES)


def choice(**settings: Any) -> Choice:
    given: dict[str, Any] = {
        "workload": WorkloadChoice(count=40),
        "arrivals": ArrivalChoice(rate=8.0),
        "form": RequestForm(""),
        "targets": Targets(ttft_s=0.3, tpot_s=0.05),
        "warmup": 0,
    }
    return Choice(**(given | settings))


@pytest.fixture
def outcome(load_test: LoadTest) -> Outcome:
    found: Outcome = load_test(some_fail, choice()).outcome
    return found


def test_json_of_a_run_has_vllms_keys_and_right_values(outcome: Outcome) -> None:
    document = json.loads(as_json(outcome, "20260101-000000"))
    assert document.keys() >= VLLM_KEYS
    assert document.keys() - VLLM_KEYS - {"penstock"} == {
        f"p{p}_{what}_ms" for p in (50, 90, 95) for what in ("ttft", "tpot", "itl", "e2el")
    }
    assert (document["num_prompts"], document["completed"], document["failed"]) == (40, 36, 4)
    assert document["mean_ttft_ms"] == pytest.approx(250.0)
    assert document["median_tpot_ms"] == pytest.approx(20.0)
    assert document["request_rate"] == 8.0
    assert document["total_input_tokens"] == 36 * 8
    assert len(document["ttfts"]) == len(document["errors"]) == len(document["itls"]) == 40
    assert sum(text.startswith("refused: scripted 429") for text in document["errors"]) == 4
    own = document["penstock"]
    assert own["attainment"] == pytest.approx(0.9)
    assert own["is_valid"] is True
    assert own["errors_by_kind"] == {"refused": 4}
    assert own["targets_ms"] == {"ttft": 300.0, "tpot": 50.0, "e2el": None}
    assert own["phases_ms"]["prefill"]["mean"] == pytest.approx(150.0)
    assert own["phases_ms"]["network"]["mean"] == pytest.approx(50.0)
    assert "p99" not in own["service_ttft_ms"]  # 36 values have none


def test_json_of_a_burst_and_of_a_closed_loop_has_no_rate(load_test: LoadTest) -> None:
    closed = load_test(some_fail, choice(arrivals=ArrivalChoice("closed", concurrency=4))).outcome
    document = json.loads(as_json(closed, "x"))
    assert (document["request_rate"], document["max_concurrency"]) == ("inf", 4)


def test_csv_has_a_row_for_each_request(outcome: Outcome) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(outcome))))
    assert len(rows) == 40
    assert list(rows[0])[: len(COLUMNS)] == list(COLUMNS)
    good = [row for row in rows if row["is_good"] == "1"]
    assert len(good) == 36
    assert {row["ttft_ms"] for row in good} == {"250.000"}
    assert {row["penstock_prefill_ms"] for row in good} == {"150.0"}
    refused = [row for row in rows if row["error"]]
    assert {(row["error"], row["status"], row["ttft_ms"]) for row in refused} == {("refused", "429", "")}


def test_tables_show_errors_first_and_no_p99_of_few_values(outcome: Outcome) -> None:
    found = tables(outcome)
    assert found[0].rows[1] == ("refused", "4", "scripted 429")
    facts = {row[0]: row[1] for row in found[1].rows}
    assert facts["requests sent / completed"] == "40 / 36"
    assert facts["requests that kept them, of those sent"].startswith("90.0% (95 %: ")
    latencies = {row[0]: row for row in found[2].rows}
    assert latencies["TTFT"][1] == "250.00"
    assert latencies["TTFT"][5] == "n < 1000"
    phases = {row[0]: row[-1] for row in found[3].rows}
    assert (phases["prefill"], phases["network"], phases["decode"]) == ("60.0%", "20.0%", "-")
    assert all(len({len(row) for row in table.rows}) == 1 for table in found[2:])


def test_warnings_name_what_spoils_a_run(load_test: LoadTest) -> None:
    late = load_test(some_fail, choice(max_lag_s=-1.0)).outcome
    assert any("INVALID: the client sent requests" in text for text in warnings(late))
    assert any("36 answers are shorter than asked" in text for text in warnings(late))


class Checker(HTMLParser):
    """Collects what a page would load, and whether its tags are paired."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe", "object", "image", "use"):
            self.loaded.append(tag)
        self.loaded += [name for name, _ in attrs if name in ("src", "href", "onload", "onclick", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> list[ElementTree.Element]:
    """The page's plots; fails when it is not whole or loads something."""
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.loaded == []
    assert "url(" not in page
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_report_of_a_run_is_one_whole_file(outcome: Outcome) -> None:
    page = as_html(outcome, "20260101-000000")
    plots = [svg.attrib["aria-label"] for svg in check_page(page)]
    assert plots == [
        "TTFT, distribution", "TPOT, distribution", "ITL between chunks, distribution", "E2EL, distribution",
        "TTFT over the run", "Requests under way", "Output tokens",
        "Phases of TTFT (percentiles of each phase by itself)",
    ]  # fmt: skip


def test_report_of_a_search_has_the_curve_of_attainment(load_test: LoadTest) -> None:
    task = Task(("http://server-0",), (0.9,), Limits(4.0, precision=1.2), ProbeSize(10.0, 40, 200))
    found = load_test(
        lambda *_: steady(0.0, 0.0, 1), choice(targets=Targets(ttft_s=1.0)), task, slots=4, service_s=0.5
    ).outcome
    page = as_html(found, "x")
    assert check_page(page)[0].attrib["aria-label"] == "Attainment by rate"
    document = json.loads(as_json(found, "x"))
    assert document["searches"][0]["request_rate"] == found.found[0].rate
    assert len(document["runs"]) == len(found.runs) > 3
    shown = tables(found)
    assert shown[0].rows[1] == ("≥ 90%", f"{found.found[0].rate:.3f}")


def test_report_of_a_comparison_has_all_runs(load_test: LoadTest) -> None:
    task = Task(("http://server-0", "http://server-1"), num_rounds=2)
    found = load_test([some_fail, some_fail], choice(), task).outcome
    check_page(as_html(found, "x"))
    compared, runs = tables(found)
    assert len(runs.rows) == 1 + 6
    assert {row[-1] for row in compared.rows[1:]} <= {"within noise", "better", "worse"}
    assert json.loads(as_json(found, "x"))["compared"][0]["figure"] == "TTFT median"


def test_hostile_text_is_escaped(load_test: LoadTest) -> None:
    model = "<script>alert(1)</script>"
    found = load_test(some_fail, choice(), model=model).outcome
    page = as_html(found, "x")
    check_page(page)
    assert model not in page
    assert "&lt;script&gt;" in page


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 10.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert ticks(0.0, 0.37) == [0.0, 0.1, 0.2, 0.3]


def test_cumulative_ends_at_one_and_is_thinned() -> None:
    assert cumulative([3.0, 1.0]) == [(1.0, 0.5), (3.0, 1.0)]
    points = thinned([(float(n), 1.0) for n in range(10_001)])
    assert len(points) <= MAX_POINTS + 1
    assert points[-1] == (10_000.0, 1.0)


def test_nothing_to_draw_is_said() -> None:
    assert plot("x", [Line("a", [])], Axes("s", "ms")) == "<p>x: nothing to draw.</p>"
    assert "nothing to draw" in bars("x", [("a", [("b", 0.0)])], "ms")


@pytest.mark.parametrize("points", [[(0.0, 0.0)], [(5.0, 1.0)], [(-3.0, 1.0), (3.0, 2.0)], [(1e-9, 1.0), (1e9, 2.0)]])
@pytest.mark.parametrize("has_log_x", [False, True])
def test_any_points_are_drawn_inside_the_frame(points: list[tuple[float, float]], has_log_x: bool) -> None:
    svg = check_page(plot("x", [Line("a", points, is_dots=True)], Axes("s", "ms", has_log_x)))[0]
    for circle in svg.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 <= float(circle.attrib["cx"]) <= 640
        assert 0 <= float(circle.attrib["cy"]) <= 260


def test_bars_are_as_long_as_their_parts() -> None:
    svg = check_page(bars("x", [("mean", [("a", 10.0), ("b", 30.0)])], "ms"))[0]
    widths = [float(rect.attrib["width"]) for rect in svg.iter("{http://www.w3.org/2000/svg}rect")][:2]
    assert widths[1] == pytest.approx(3 * widths[0], rel=1e-3)
