"""A load test of a real cluster: what the client measures and what the gateway reports of the same requests agree."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from penstock.cli.main import main
from penstock.testing.serving import serving

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]


def test_load_test_of_a_real_cluster(model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"report.{name}" for name in ("json", "csv", "html")}
    outputs = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    load = ["--workload", "prefix", "--prefixes", "2", "--prefix-tokens", "64", "--input-tokens", "16-48"]
    load += ["--output-tokens", "8-16", "--num-requests", "20", "--concurrency", "2", "--goodput", "ttft:60000"]
    with serving() as cluster:
        code = main(["bench", "serve", "--url", cluster.url, *load, "--max-lag-ms", "60000", "--reset-cache", *outputs])
        cluster.wait_rest()
    captured = capsys.readouterr()
    assert code == 0, captured.err
    document = json.loads(files["json"].read_text())
    assert (document["completed"], document["failed"]) == (20, 0)
    own = document["penstock"]
    assert own["attainment"] == 1.0
    assert own["counts"]["has_chunk_tokens"] is True
    assert own["counts"]["num_short_answers"] == 0
    assert own["counts"]["cached_share"] > 0.2  # two prefixes of 64 tokens among prompts of 100
    with files["csv"].open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        assert row["prompt_tokens"] == row["planned_prompt_tokens"]
        assert row["output_tokens"] == row["planned_output_tokens"]
        # The gateway's own TTFT lies within the client's; its phases add up to it.
        assert float(row["penstock_ttft_ms"]) <= float(row["ttft_ms"])
        names = ("gateway", "route", "queue", "prefill", "transfer", "other")
        parts = sum(float(row[f"penstock_{name}_ms"]) for name in names)
        assert parts == pytest.approx(float(row["penstock_ttft_ms"]), abs=0.01)
    assert "Phases of TTFT" in files["html"].read_text()
