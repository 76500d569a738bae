"""`penstock role` and `penstock restart` against prepared answers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from penstock.cli.main import main
from penstock.cli.role import partners_of


def status(**changes: Any) -> dict[str, Any]:
    row = {"worker_id": "decode-1", "role": "decode", "state": "ready", "epoch": "a", "running": 2, "waiting": 0}
    return {"workers": [{**row, **changes}]}


def test_role_is_asked_for_and_awaited(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"/workers/decode-1/role": canned.json({}), "/status": canned.json(status(role="prefill"))}
    with canned.server(answers) as server:
        assert main(["role", "decode-1", "prefill", "--url", server.url]) == 0
        path, _, body = server.seen[0]
    assert (path, body) == ("/workers/decode-1/role", {"role": "prefill"})
    assert capsys.readouterr().out == "decode-1 is for prefill: 2 running, 0 waiting\n"


def test_worker_that_does_not_change_is_one_error(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"/workers/decode-1/role": canned.json({}), "/status": canned.json(status())}
    with canned.server(answers) as server:
        assert main(["role", "decode-1", "prefill", "--timeout", "1", "--url", server.url]) == 1
    assert "worker decode-1: 1 s are not enough for it to be prefill; it is ready" in capsys.readouterr().err


def test_refusal_of_the_router_is_shown(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = canned.json({"error": {"message": "decode-0 is the only worker that decodes"}}, status=400)
    with canned.server({"/workers/decode-0/role": refusal}) as server:
        assert main(["role", "decode-0", "prefill", "--url", server.url]) == 1
    assert "the only worker that decodes" in capsys.readouterr().err


def test_role_that_is_none_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["role", "decode-0", "prefil"])
    assert end.value.code == 2
    assert "did you mean `prefill`?" in capsys.readouterr().err


def test_restart_of_a_stranger_or_a_dead_process_is_one_error(canned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with canned.server({"/status": canned.json(status(pid=ended.pid))}) as server:
        assert main(["restart", "nobody", "--url", server.url]) == 1
        assert "worker 'nobody' is not there\nhint: there are decode-1" in capsys.readouterr().err
        assert main(["restart", "--url", server.url]) == 1
    assert "run this on its machine" in capsys.readouterr().err


def test_partners_are_those_that_hand_over_one_way_or_the_other() -> None:
    roles = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode", "b0": "both", "b1": "both"}
    rows = {name: {"role": role, "state": "lost" if name == "p1" else "ready"} for name, role in roles.items()}
    assert partners_of("d0", rows) == {"p0", "b0", "b1"}
    assert partners_of("p0", rows) == {"d0", "d1", "b0", "b1"}
    assert partners_of("b0", rows) == {"p0", "d0", "d1", "b1"}
