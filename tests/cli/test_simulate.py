from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.cli.main import main


@pytest.fixture
def trace(tmp_path: Path) -> str:
    rows = [
        {"timestamp": 500 * i, "input_length": 700, "output_length": 20, "hash_ids": [i // 2, 100 + i]}
        for i in range(12)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_table_has_a_row_for_each_policy_and_shape(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", trace, "--workers", "1P+2D,3B", "--policy", "auto,mooncake", "--limit", "8"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("WORKERS")
    assert [line.split()[:2] for line in lines[1:]] == [
        ["1P+2D", "auto"],
        ["1P+2D", "mooncake"],
        ["3B", "auto"],
        ["3B", "mooncake"],
    ]
    assert "8 requests" in err


def test_json_has_the_same_figures_each_time(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        assert main(["simulate", trace, "--policy", "auto", "--json", "--model", "8b", "--rate", "4"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    (row,) = json.loads(texts[0])
    assert (row["policy"], row["num_requests"], row["num_failed"], row["shape"]) == ("auto", 12, 0, "8P+8D")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--policy", "astrology"], "'astrology' is not known"),
        (["--model", "900b"], "'900b' is not known"),
        (["--workers", "8P"], "'8P' is no shape"),
        (["--workers", "8P+0D"], "'8P\\+0D' is no shape"),
    ],
)
def test_what_does_not_exist_is_named(
    trace: str, arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", trace, *arguments]) != 0
    import re

    assert re.search(what, capsys.readouterr().err)


def test_trace_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_balanced_rows_and_parts_stand_beside_the_others(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "simulate",
        trace,
        "--workers",
        "1P+2D",
        "--policy",
        "auto",
        "--balance-roles",
        "--parts",
        "2",
        "--json",
    ]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    name = "1P+2D balanced"
    assert [row["shape"] for row in rows] == [
        *("1P+2D", "1P+2D, part 1", "1P+2D, part 2"),
        *(name, f"{name}, part 1", f"{name}, part 2"),
    ]
    assert [row["num_requests"] for row in rows] == [12, 6, 6] * 2
    assert {row["num_role_changes"] for row in rows} == {0}


def test_shift_is_a_generated_load(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "shift", "--limit", "5", "--workers", "1P+1D", "--policy", "auto", "--json"]
    assert main(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["num_requests"], row["num_failed"]) == (5, 0)
