"""`penstock status` against prepared answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.cli.main import main
from penstock.cli.status import format_status

STATUS: dict[str, Any] = {
    "ready": True,
    "why_not_ready": "",
    "active_requests": 3,
    "queued_requests": 1,
    "workers": [
        {
            "worker_id": "prefill-0",
            "role": "prefill",
            "pid": 41,
            "epoch": "0123456789abcdef",
            "state": "ready",
            "free_blocks": 90,
            "total_blocks": 100,
            "running": 2,
            "waiting": 1,
            "transports": {"decode-0": "shm"},
        },
        {"worker_id": "decode-0", "role": "decode", "pid": 4242, "epoch": "fedcba9876543210", "state": "lost"},
    ],
}


def test_status_prints_one_aligned_row_a_worker(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with canned.server({"/status": canned.json(STATUS)}) as server:
        assert main(["status", "--url", server.url + "/v1/"]) == 0
    assert capsys.readouterr().out == (
        "WORKER     ROLE      PID  EPOCH   STATE  FREE/TOTAL BLOCKS  RUNNING  WAITING  LINKS\n"
        "prefill-0  prefill    41  012345  ready             90/100        2        1  decode-0:shm\n"
        "decode-0   decode   4242  fedcba  lost                 0/0        0        0  -\n"
        "ready; 3 requests active, 1 queued\n"
    )


def test_status_json_is_the_gateways_document(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with canned.server({"/status": canned.json(STATUS)}) as server:
        assert main(["status", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_status_colours_states_only_when_asked() -> None:
    assert "\x1b[32mready\x1b[0m" in format_status(STATUS, is_coloured=True)
    assert "\x1b" not in format_status(STATUS)


def test_status_strips_control_characters_of_names() -> None:
    worker = {"worker_id": "a\x1b[2Jb", "role": "decode", "pid": 1, "epoch": "e", "state": "ready"}
    assert "a[2Jb" in format_status({"workers": [worker]})


def test_status_of_a_cluster_that_is_not_ready_says_why() -> None:
    text = format_status({"workers": [], "ready": False, "why_not_ready": "no decode worker"})
    assert text.endswith("not ready: no decode worker; 0 requests active, 0 queued")


def test_api_key_is_sent_and_its_absence_explained(
    canned: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = canned.json({"error": {"message": "no API key"}}, status=401)
    monkeypatch.setenv("PENSTOCK_API_KEY", "from-environment")
    with canned.server({"/status": refusal}) as server:
        assert main(["status", "--url", server.url]) == 1
        assert main(["status", "--url", server.url, "--api-key", "given"]) == 1
    assert [headers["Authorization"] for _, headers, _ in server.seen] == ["Bearer from-environment", "Bearer given"]
    assert f"penstock: error: {server.url} answered 401: no API key\nhint: give the key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, "text/html", b"<html>"), "did not answer with JSON"),
        ((200, "application/json", b"[]"), "has no list of workers"),
        ((500, "text/plain", b"\xff\xfe"), "answered 500"),
    ],
)
def test_answer_of_something_else_is_one_clear_error(
    canned: Any, answer: tuple[int, str, bytes], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with canned.server({"/status": answer}) as server:
        assert main(["status", "--url", server.url]) == 1
    assert message in capsys.readouterr().err


def test_nothing_listening_is_one_error_with_the_next_step(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with canned.server({}) as server:
        url = server.url
    assert main(["status", "--url", url]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"penstock: error: no answer from {url}: ")
    assert hint == "hint: start a cluster with `penstock serve`, or give --url"


def test_url_that_is_none_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", "localhost:8000"]) == 2
    assert "is not an http URL" in capsys.readouterr().err


def test_status_tells_what_is_left_alone_and_which_roles_have_changed() -> None:
    worker = {"worker_id": "d0", "role": "decode", "breakers": {"decode": 1.5}, "canary": "canary failed: no disk"}
    change = {
        "worker_id": "d1",
        "before": "decode",
        "after": "prefill",
        "by": "planner",
        "reason": "why",
        "age_s": 12.4,
    }
    changes = [{**change, "worker_id": f"old{number}"} for number in range(5)]
    lines = format_status({"workers": [worker], "role_changes": [*changes, change]}).splitlines()
    assert lines[-5:] == [
        "d0: decode is left alone since attempts fail there, next one in 1.5 s",
        "d0: canary failed: no disk",
        "d1: decode → prefill 12 s ago by the planner: why",
        "old4: decode → prefill 12 s ago by the planner: why",
        "old3: decode → prefill 12 s ago by the planner: why",
    ]
