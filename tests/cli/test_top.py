"""`penstock top`: frames from two looks, as text and as data, with a terminal and without."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from typing import Any

import pytest

from penstock.cli.main import main
from penstock.cli.top_frame import build_frame, format_frame


def row(name: str, role: str, **changes: Any) -> dict[str, Any]:
    load = {"busy_s": 0.0, "prefill_tokens": 0, "decode_tokens": 0, "transferred_bytes": 0, **changes.pop("load", {})}
    base = {
        "worker_id": name,
        "role": role,
        "epoch": "e",
        "state": "ready",
        "running": 1,
        "waiting": 0,
        "free_blocks": 60,
        "total_blocks": 100,
    }
    return {**base, **changes, "load": load}


BEFORE: dict[str, Any] = {"workers": [row("decode-0", "decode"), row("prefill-0", "prefill"), row("gone", "decode")]}
AFTER: dict[str, Any] = {
    "ready": True,
    "policy": "auto",
    "active_requests": 5,
    "queued_requests": 2,
    "workers": [
        row(
            "decode-0",
            "decode",
            load={
                "busy_s": 1.0,
                "decode_tokens": 400,
                "transferred_bytes": 4 << 20,
                "receiving": 1,
                "drafted_tokens": 10,
                "accepted_tokens": 5,
            },
        ),
        row("decode-1", "decode", state="lost", epoch="new", restarts=2),
        row("prefill-0", "prefill", waiting=3, load={"busy_s": 1.9, "prefill_tokens": 3000, "handing_off": 2}),
    ],
}


def test_frame_has_rates_from_two_looks() -> None:
    frame = build_frame(BEFORE, AFTER, 2.0)
    by_name = {worker["worker_id"]: worker for worker in frame["workers"]}
    assert list(by_name) == ["decode-0", "decode-1", "prefill-0"]
    assert by_name["decode-0"]["decode_tokens_per_s"] == 200.0
    assert by_name["prefill-0"]["prefill_tokens_per_s"] == 1500.0
    assert by_name["prefill-0"]["utilisation"] == pytest.approx(0.95)
    assert by_name["decode-0"]["used_blocks"] == 40
    assert by_name["decode-1"]["utilisation"] is None, "an incarnation that was not there before has no rates yet"
    assert frame["pipe"] == {"handing_off": 2, "receiving": 1, "bytes_per_s": float(2 << 20)}


def test_frame_of_a_new_incarnation_never_goes_backwards() -> None:
    after = {"workers": [row("decode-0", "decode", load={"busy_s": -5.0, "decode_tokens": -9})]}
    (worker,) = build_frame(BEFORE, after, 1.0)["workers"]
    assert (worker["utilisation"], worker["decode_tokens_per_s"]) == (0.0, 0.0)


def test_text_shows_the_pools_and_the_pipe_between_them() -> None:
    lines = format_frame(build_frame(BEFORE, AFTER, 2.0)).splitlines()
    assert lines[0] == "router: ready; 5 active, 2 queued"
    assert lines[3] == "prefill:"
    assert lines[4].split() == ["prefill-0", "ready", "95%", "1", "3", "40/100", "1500", "0", "2", "-", "0"]
    assert lines[5] == "  ║ hand-offs: 2 leaving, 1 arriving, 2.0 MiB/s"
    assert lines[6] == "decode:"
    assert lines[7].split() == ["decode-0", "ready", "50%", "1", "0", "40/100", "0", "200", "1", "50%", "0"]
    assert lines[8].split() == ["decode-1", "lost", "-", "1", "0", "40/100", "-", "-", "0", "-", "2"]


@pytest.mark.parametrize("status", [{"workers": []}, {"workers": [], "ready": False, "why_not_ready": "nobody"}])
def test_empty_cluster_has_a_frame(status: dict[str, Any]) -> None:
    text = format_frame(build_frame(status, status, 1.0))
    assert text.endswith("no workers")
    assert ("not ready: nobody" in text) == ("ready" in status)


def test_worker_of_an_older_version_shows_dashes() -> None:
    old = {"worker_id": "d\x1b[2J", "role": "both", "epoch": "e", "state": "ready", "load": {"running": 1}}
    frame = build_frame({"workers": [old]}, {"workers": [old]}, 1.0)
    assert frame["workers"][0]["decode_tokens_per_s"] is None
    assert "\x1b" not in format_frame(frame)


def test_once_prints_one_frame_as_text_or_as_data(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with canned.server({"/status": canned.json(AFTER)}) as server:
        assert main(["top", "--url", server.url, "--once", "--interval", "0.1"]) == 0
        text = capsys.readouterr().out
        assert main(["top", "--url", server.url, "--once", "--json", "--interval", "0.1"]) == 0
    frame = json.loads(capsys.readouterr().out)
    assert text.startswith("router: ready")
    assert [worker["worker_id"] for worker in frame["workers"]] == ["decode-0", "decode-1", "prefill-0"]
    assert frame["span_s"] >= 0.1


def test_without_a_terminal_it_prints_one_frame_and_ends(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with canned.server({"/status": canned.json(AFTER)}) as server:
        assert main(["top", "--url", server.url, "--interval", "0.1"]) == 0
    assert capsys.readouterr().out.count("router: ready") == 1


def test_something_else_than_a_gateway_is_one_error(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with canned.server({"/status": canned.json([])}) as server:
        assert main(["top", "--url", server.url, "--once"]) == 1
    assert "has no list of workers" in capsys.readouterr().err


def test_on_a_terminal_it_goes_on_until_ctrl_c_and_gives_the_screen_back(canned: Any) -> None:
    master, slave = pty.openpty()
    with canned.server({"/status": canned.json(AFTER)}) as server:
        command = [sys.executable, "-m", "penstock", "top", "--url", server.url, "--interval", "0.1"]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
        process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        seen = _read_until(master, b"router: ready")
        process.send_signal(signal.SIGINT)
        seen += _read_until(master, b"\x1b[?1049l")
        assert process.wait(30) == 0
    os.close(master)
    assert b"Traceback" not in seen
    assert b"\x1b[?1049h" in seen, "it used the other screen"


def _read_until(master: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        ready, _, _ = select.select([master], [], [], 60)
        assert ready, seen
        try:
            seen += os.read(master, 65536)
        except OSError:
            raise AssertionError(f"the terminal closed before {wanted!r}: {seen!r}") from None
    return seen


def test_frame_tells_open_breakers_and_changes_of_roles() -> None:
    change = {"worker_id": "d1", "before": "decode", "after": "both", "by": "operator", "reason": "asked for"}
    after = {
        "workers": [row("d0", "decode", breakers={"prefill": 0.0}, canary="has given no token yet")],
        "balances_roles": True,
        "role_changes": [{**change, "age_s": 3.0}],
    }
    frame = build_frame(BEFORE, after, 1.0)
    assert frame["balances_roles"] is True
    assert frame["workers"][0]["breakers"] == {"prefill": 0.0}
    assert format_frame(frame).splitlines()[-3:] == [
        "d0: prefill is left alone since attempts fail there, next one in 0.0 s",
        "d0: has given no token yet",
        "d1: decode → both 3 s ago by the operator: asked for",
    ]
