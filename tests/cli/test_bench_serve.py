"""`penstock bench serve`: against a scripted server on loopback, and what it says of a wrong command line."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.cli.main import main
from penstock.testing.mock_server import Body, MockServer, Script, steady


@contextmanager
def listening(server: MockServer) -> Iterator[str]:
    """The server in a thread of its own; its clock is the client's, the machine's monotonic one."""
    is_up, urls = threading.Event(), list[str]()
    loop = asyncio.new_event_loop()
    is_over = asyncio.Event()

    async def serve() -> None:
        async with server.listening() as url:
            urls.append(url)
            is_up.set()
            await is_over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert is_up.wait(60)
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(is_over.set)
        thread.join()
        loop.close()


def script(number: int, body: Body) -> Script:
    return Script(status=429) if number == 20 else steady(0.02, 0.002, int(body["max_tokens"]), tokens_each=2)


WORDS = ["--num-requests", "30", "--request-rate", "60", "--output-tokens", "4-8", "--warmup", "2"]
WORDS += ["--input-tokens", "10-3000"]  # each prompt has a length of its own, by which its two records are matched


def test_run_writes_its_files_and_agrees_with_the_servers_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = MockServer(script)
    files = {name: tmp_path / f"report.{name}" for name in ("json", "csv", "html")}
    outputs = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    with listening(server) as url:
        code = main(
            ["bench", "serve", "--url", url, *WORDS, "--goodput", "ttft:60000", "--max-lag-ms", "60000", *outputs]
        )
    captured = capsys.readouterr()
    assert code == 0
    assert "requests sent / completed               30 / 29" in captured.out
    assert "refused" in captured.out
    assert "run: " in captured.err
    document = json.loads(files["json"].read_text())
    assert (document["completed"], document["failed"]) == (29, 1)
    assert document["penstock"]["attainment"] == pytest.approx(29 / 30)
    assert files["html"].read_text().startswith("<!doctype html>")
    with files["csv"].open() as stream:
        rows = [row for row in csv.DictReader(stream) if not row["error"]]
    known = [one for one in server.served[3:] if one.written]
    assert len(rows) == len(known) == 29
    by_length = {len(one.body["prompt"]): one for one in known}
    assert len(by_length) == 29
    for row in rows:
        one = by_length[int(row["planned_prompt_tokens"])]
        # The client has seen each moment at or after the server's, and nothing is shorter than its script.
        assert float(row["ttft_ms"]) >= 1e3 * (one.written[0][0] - one.received_s) - 0.01
        assert float(row["ttft_ms"]) >= 20.0
        assert int(row["output_tokens"]) == sum(count for _, count in one.written)
        assert int(row["chunks"]) <= len(one.written)


def test_invalid_run_ends_with_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with listening(MockServer(script)) as url:
        words = ["--num-requests", "200", "--request-rate", "inf", "--output-tokens", "2", "--max-lag-ms", "0.1"]
        code = main(["bench", "serve", "--url", url, *words, "--quiet"])
    captured = capsys.readouterr()
    assert code == 1  # nobody sends two hundred requests within a tenth of a millisecond
    assert "INVALID: the client sent requests" in captured.err
    assert "offline burst" in captured.out


def test_server_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9", "--quiet"]) == 2
    assert "no answer from http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", "ftp://x"], "--url: 'ftp://x' is not an http URL"),
        (["--goodput", "ttft=5"], "--goodput: 'ttft=5' is no target"),
        (["--goodput", "ttft:0"], "--goodput: 'ttft:0' is no target"),
        (["--search"], "--search: say what a good request keeps"),
        (["--search", "--goodput", "ttft:5", "--concurrency", "4"], "--search: needs arrivals at a rate"),
        (["--search", "--goodput", "ttft:5", "--attainment", "90"], "--attainment: shares lie between 0 and 1"),
        (["--search", "--goodput", "ttft:5", "--attainment", "x"], "--attainment: 'x' is not a list"),
        (["--concurrency", "4", "--request-rate", "2"], "--concurrency: a closed loop has no rate"),
        (["--arrivals", "closed"], "--arrivals closed: say how many"),
        (["--arrivals", "linear-ramp"], "--arrivals linear-ramp: say where it ends"),
        (["--arrivals", "trace"], "--arrivals trace: the workload random has no times"),
        (["--arrivals", "poisson", "--request-rate", "inf"], "--request-rate: inf is not a rate"),
        (["--request-rate", "-1"], "--request-rate: must be above 0, or inf, got '-1'"),
        (["--request-rate", "nan"], "--request-rate: must be above 0, or inf, got 'nan'"),
        (["--input-tokens", "9-3"], "--input-tokens: must be from 1"),
        (["--token-ids", "7"], "--token-ids: must be a range"),
        (["--extra-body", "{"], "--extra-body: not JSON"),
        (["--extra-body", "[1]"], "--extra-body: must be a JSON object"),
        (["--file", "x.jsonl"], "--file: the workload random reads no file"),
        (["--prompts", "ids", "--endpoint", "chat"], "--prompts ids: only random prompts"),
        (["--html", "/nowhere/at/all.html"], "there is no folder /nowhere/at"),
    ],
)
def test_wrong_command_line_is_refused_before_anything_is_sent(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_vllms_option_names_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "4", "--num-prompts", "5"]
    server = MockServer(lambda *_: steady(0.001, 0.001, 4))
    with listening(server) as url:
        assert main(["bench", "serve", "--url", url, *words, "--max-concurrency", "2", "--max-lag-ms", "60000"]) == 0
    assert {len(one.body["prompt"]) for one in server.served} == {16}
    assert "closed loop, 2 at once" in capsys.readouterr().out


EASY = ["--goodput", "ttft:60000", "--max-lag-ms", "60000", "--output-tokens", "3", "--warmup", "0", "--quiet"]


def test_search_says_the_highest_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--search", "--request-rate", "20", "--max-rate", "40", "--probe-s", "1", "--probe-requests", "10"]
    with listening(MockServer(lambda *_: steady(0.001, 0.001, 3))) as url:
        code = main(["bench", "serve", "--url", url, *EASY, *words, "--json", str(tmp_path / "found.json")])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "highest rate with TTFT ≤ 60000 ms" in captured.out
    assert "≥ 99%" in captured.out
    document = json.loads((tmp_path / "found.json").read_text())
    assert [(one["attainment"], one["request_rate"]) for one in document["searches"]] == [(0.99, 40.0), (0.9, 40.0)]
    assert len(document["runs"]) == 3  # 20, 40 and its confirmation; the second share needs no probe of its own


def test_comparison_runs_the_first_server_twice_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (MockServer(lambda *_: steady(0.001, 0.001, 3)) for _ in range(2))
    words = ["--rounds", "2", "--num-requests", "10", "--request-rate", "100"]
    with listening(one) as url, listening(other) as against:
        code = main(["bench", "serve", "--url", url, "--against", against, *EASY, *words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert f"against {url}, median of rounds" in captured.out
    assert len(one.served) - 1 == 2 * (len(other.served) - 1) == 40


def test_trace_of_a_file_is_replayed_faster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"2023-11-16 18:15:{second:02}.0,{100 + second},3\n" for second in range(10))
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    server = MockServer(lambda *_: steady(0.001, 0.001, 3))
    words = ["--workload", "azure", "--file", str(trace), "--trace-speed", "20", "--length-scale", "0.5"]
    with listening(server) as url:
        assert main(["bench", "serve", "--url", url, *EASY, *words]) == 0
    assert [len(one.body["prompt"]) for one in server.served[1:]] == [round((100 + n) / 2) for n in range(10)]
    assert "the trace's own times, 20 times as fast" in capsys.readouterr().out


def test_file_that_is_not_what_it_should_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    words = ["--workload", "azure", "--file", str(tmp_path / "x.csv")]
    with listening(MockServer(lambda *_: steady(0.001, 0.001, 3))) as url:
        assert main(["bench", "serve", "--url", url, *EASY, *words]) == 2
    assert "no column 'TIMESTAMP'" in capsys.readouterr().err


def test_ctrl_c_ends_the_run_with_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupting(number: int, body: Body) -> Script:
        if number == 25:
            os.kill(os.getpid(), signal.SIGINT)
        return steady(0.02, 0.002 if number < 20 else 5.0, int(body["max_tokens"]))

    path = tmp_path / "report.json"
    with listening(MockServer(interrupting)) as url:
        code = main(["bench", "serve", "--url", url, *WORDS, "--max-lag-ms", "60000", "--json", str(path)])
    captured = capsys.readouterr()
    document = json.loads(path.read_bytes())
    assert code == 130
    assert "INTERRUPTED" in captured.err
    assert document["penstock"]["is_interrupted"]
    assert 0 < document["completed"] < 30
    assert document["failed"] == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
