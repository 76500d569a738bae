"""`penstock explain` against prepared answers."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from penstock.cli.explain_text import PLAIN, format_explanation
from penstock.cli.main import main
from penstock.gateway.explain.parts import ITL_PARTS, TTFT_PARTS
from penstock.gateway.explain.summary import explain, report_request
from penstock.gateway.explain.window import RequestFacts, Window
from penstock.protocol.messages import WorkerLoad
from penstock.router.interface import ClusterStatus, WorkerStatus

FACTS = RequestFacts(
    "cmpl-1-0",
    "mine\x1b[2J",
    20.0,
    tuple({"prefill_compute": 60_000, "transfer": 1_500, "first_step": 30_000}.get(name, 0) for name in TTFT_PARTS),
    (100, 0, 20_000, 900),
    0.4,
    0.3,
    0.09,
    512,
    0,
    32,
    "decode-0",
    "prefill-0",
    0.0015,
    11_000_000,
)


def document(num_requests: int = 40, window: Window | None = None) -> Any:
    """What a gateway would answer: so many requests a second apart, and two workers."""
    window = window or Window()
    for number in range(num_requests):
        window.note_request(FACTS._replace(at_s=float(number)))
        window.note_gap(float(number), (100, 0, 4_000, 50))
    for at_s in (0.0, 40.0):
        load = WorkerLoad(total_blocks=100, free_blocks=75, busy_s=0.5 + at_s / 2, steps=10 + int(at_s))
        rows = [
            WorkerStatus(name, "0" * 16, role, 1, "ready", load, 1, 0, 75, 100, block_size=16)  # type: ignore[arg-type]
            for name, role in (("prefill-0", "prefill"), ("decode-0", "decode"))
        ]
        window.note_status(at_s, ClusterStatus(True, "", "auto", rows, 1, 0))
    return json.loads(msgspec.json.encode(explain(window, 40.0, 40.0)))


def test_explain_prints_parts_bottleneck_workers_and_what_if(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with canned.server({"/explain?window_s=40": canned.json(document())}) as server:
        assert main(["explain", "--url", server.url, "--window", "40"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "last 40 s: 40 requests ended (1.00 a second), 0 failed"
    cells = [line.split() for line in lines]
    assert ["prefill", "compute", "60.0", "60.0", "60.0", "60.0", "66%"] in cells
    assert ["transfer", "1.5", "1.5", "1.5", "1.5", "2%"] in cells
    assert ["all", "(40)", "91.5", "91.5", "91.5", "91.5", "100%"] in cells
    assert "Bottleneck: prefill-compute. Computing the prompts (98% of TTFT at p90); faster workers" in text
    assert "  - 1 prefill worker: 50% busy, up to 0 waiting, KV use up to 25%" in lines
    assert "Streams: decode-step." in text
    assert "+1 prefill worker" in text
    assert "queue in the router" not in text, "a part that never took any time is left out"


def test_every_part_has_a_plain_name() -> None:
    assert set(PLAIN) == set(TTFT_PARTS) | set(ITL_PARTS)


def test_explain_of_an_idle_cluster_says_so() -> None:
    text = format_explanation(document(0))
    assert "Bottleneck: idle. No request has had its first token within the window" in text
    assert "What if: no figures. 0 requests in the window; 20 are the least to replay." in text


def test_explain_of_a_cluster_without_workers() -> None:
    empty = json.loads(msgspec.json.encode(explain(Window(), 40.0, 40.0)))
    assert "no workers" in format_explanation(empty)


def test_explain_json_is_the_gateways_document(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with canned.server({"/explain?window_s=60": canned.json(document())}) as server:
        assert main(["explain", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document()


def test_one_request_is_shown_with_its_sum(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(msgspec.json.encode({"requests": [report_request(FACTS, 25.0)]}))
    with canned.server({"/explain/a%2Fb": canned.json(answer)}) as server:
        assert main(["explain", "--url", server.url, "--request", "a/b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cmpl-1-0, 5 s ago, prefill-0 → decode-0"
    assert ["sum", "91.500"] in [line.split() for line in lines]
    assert any(line.startswith("between its tokens") for line in lines)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"error": {"message": "no route for this URL"}}, "answered 404"),  # an older gateway
        ({}, "has no `ttft`"),
        ({"ttft": {}}, "in a form that this command does not know"),
    ],
)
def test_other_servers_give_one_clear_error(
    canned: Any, answer: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = 404 if "error" in answer else 200
    with canned.server({"/explain?window_s=60": canned.json(answer, status=status)}) as server:
        assert main(["explain", "--url", server.url]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("window", ["0", "301", "x"])
def test_window_out_of_bounds_is_a_usage_error(window: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["explain", "--window", window])
    assert end.value.code == 2
    assert "from 1 to 300" in capsys.readouterr().err
