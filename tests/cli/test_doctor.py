"""`penstock doctor`: each finding has a level and, unless all is well, a next step."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from penstock.cli import doctor
from penstock.cli.doctor import Check, check_cpu, check_memory, check_port, check_thread_settings, format_checks
from penstock.cli.main import main


def test_findings_are_aligned_and_hints_stand_below() -> None:
    checks = [Check("python", "OK", "3.11"), Check("memory", "WARN", "1 GiB", "close something")]
    assert format_checks(checks) == "OK    python  3.11\nWARN  memory  1 GiB\n      hint: close something"
    assert "\x1b[33mWARN\x1b[0m" in format_checks(checks, is_coloured=True)


@pytest.mark.parametrize(("level", "code"), [("OK", 0), ("WARN", 0), ("FAIL", 1)])
def test_only_a_fail_fails_the_command(
    level: doctor.Level, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda port: iter([Check("x", level, "y", "z")]))
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == {
        "checks": [{"name": "x", "level": level, "detail": "y", "hint": "z"}]
    }


def test_every_check_of_this_machine_ends_and_hints_when_it_warns() -> None:
    checks = list(doctor.examine(8000))
    assert len({check.name for check in checks}) == len(checks) >= 12
    assert all(bool(check.hint) == (check.level != "OK") for check in checks)


def test_missing_package_is_a_fail_with_the_command_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_REQUIRED", ("numpy", "no-such-package-x"))
    check = doctor.check_packages()
    assert (check.level, check.hint) == ("FAIL", "pip install no-such-package-x")


@pytest.mark.parametrize(
    ("flags", "level", "words"),
    [
        ({"avx2", "avx512f", "avx512_bf16"}, "OK", "; native bfloat16"),
        ({"avx2"}, "OK", "no native bfloat16"),
        ({"sse2"}, "WARN", "no vector extension found"),
    ],
)
def test_cpu_flags_decide_the_finding(flags: set[str], level: str, words: str) -> None:
    check = check_cpu(frozenset(flags))
    assert check.level == level
    assert words in check.detail


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n", "OK"),
        ("MemTotal: 8388608 kB\nMemAvailable: 102400 kB\n", "WARN"),
        ("nonsense", "WARN"),
    ],
)
def test_memory_is_read_from_meminfo(tmp_path: Path, text: str, level: str) -> None:
    file = tmp_path / "meminfo"
    file.write_text(text, encoding="utf-8")
    assert check_memory(file).level == level


def test_taken_port_is_noticed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert check_port("127.0.0.1", port).detail == f"port {port} on 127.0.0.1 is taken by another program"
    assert check_port("127.0.0.1", port).level == "OK"


def test_spinning_threads_are_noticed() -> None:
    assert check_thread_settings({"OMP_WAIT_POLICY": "ACTIVE"}).level == "WARN"
    assert check_thread_settings({"OMP_NUM_THREADS": "2", "HOME": "/"}).detail == "OMP_NUM_THREADS=2"
