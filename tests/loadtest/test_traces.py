"""Traces are read as they are defined, and the real ones have the figures that their descriptions give."""

from __future__ import annotations

import gzip
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError
from penstock.loadtest.plan import Conversation
from penstock.loadtest.rendering import Renderer
from penstock.loadtest.traces import Scale, azure, burstgpt, length_pairs, mooncake

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:50.1000000,10,5
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,0,1087,API log
118,ChatGPT,417,276,693,Conversation log
"""
MOON = """{"timestamp": 0, "input_length": 1030, "output_length": 52, "hash_ids": [46, 47, 48]}
{"timestamp": 0, "input_length": 700, "output_length": 3, "hash_ids": [46, 50]}
{"timestamp": 3000, "input_length": 1024, "output_length": 9, "hash_ids": [46, 47]}
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def prompt_lengths(found: list[Conversation]) -> list[int]:
    return [one.turns[0].num_prompt_tokens for one in found]


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_azure_rows_come_in_order_of_time_from_zero(name: str, tmp_path: Path) -> None:
    found = azure(written(tmp_path, name, AZURE), 0, Scale())
    assert prompt_lengths(found) == [374, 10, 396]
    assert [one.turns[0].num_output_tokens for one in found] == [44, 5, 109]
    assert [one.at_s for one in found] == pytest.approx([0.0, 3.41941, 4.314579], abs=1e-6)


def test_azure_time_may_have_a_zone(tmp_path: Path) -> None:
    rows = "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,1,1\n"
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows
    found = azure(written(tmp_path, "t.csv", text), 0, Scale())
    assert found[1].at_s == pytest.approx(0.99007)


def test_burstgpt_leaves_failed_requests_out(tmp_path: Path) -> None:
    found = burstgpt(written(tmp_path, "b.csv", BURST), 0, Scale())
    assert prompt_lengths(found) == [472, 417]
    assert [one.at_s for one in found] == [0.0, 113.0]


def test_mooncake_blocks_with_equal_ids_are_equal_prefixes(tmp_path: Path) -> None:
    found = mooncake(written(tmp_path, "m.jsonl", MOON), 0, Scale())
    ids = [Renderer().ids(one.turns[0].parts) for one in found]
    assert [len(one) for one in ids] == [1030, 700, 1024]
    assert ids[0][:512] == ids[1][:512] == ids[2][:512]
    assert ids[0][512:1024] == ids[2][512:1024]
    assert ids[0][512:600] != ids[1][512:600]


def test_mooncake_times_written_in_batches_are_spread_unless_kept(tmp_path: Path) -> None:
    path = written(tmp_path, "m.jsonl", MOON)
    assert [one.at_s for one in mooncake(path, 0, Scale())] == [0.0, 1.5, 3.0]
    assert [one.at_s for one in mooncake(path, 0, Scale(), is_spreading=False)] == [0.0, 0.0, 3.0]


def test_length_scale_shrinks_blocks_too_so_that_prefixes_stay_shared(tmp_path: Path) -> None:
    found = mooncake(written(tmp_path, "m.jsonl", MOON), 0, Scale(0.25))
    ids = [Renderer().ids(one.turns[0].parts) for one in found]
    assert [len(one) for one in ids] == [258, 175, 256]
    assert ids[0][:256] == ids[2]
    assert ids[0][:128] == ids[1][:128]
    assert found[0].turns[0].num_output_tokens == 13


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("A,B\n1,2\n", "no column 'TIMESTAMP' among A, B"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,2\n", "line 2: 'noon' is not a time"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1,x,2\n", "line 2: 'x' is not a number"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1,-4,2\n",
            "line 2: '-4' is not a number of tokens",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1\n",
            "line 2: 1 columns where the header has 3",
        ),
    ],
)
def test_bad_csv_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        azure(written(tmp_path, "bad.csv", text), 0, Scale())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 1: Object missing required field"),
        ("nonsense", "line 1: JSON is malformed"),
        ('{"timestamp": 0, "input_length": "a", "output_length": 1, "hash_ids": []}', r"Expected `int`.*input_length"),
        ('{"timestamp": 0, "input_length": -5, "output_length": 1, "hash_ids": []}', "is negative"),
    ],
)
def test_bad_mooncake_row_is_refused(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        mooncake(written(tmp_path, "bad.jsonl", line), 0, Scale())


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        azure(tmp_path / "none.csv", 0, Scale())
    broken = tmp_path / "cut.csv.gz"
    broken.write_bytes(gzip.compress(AZURE.encode() * 500)[:60])
    with pytest.raises(ConfigError, match="cannot be read as text"):
        azure(broken, 0, Scale())


def test_real_azure_conversation_trace(shared_data: Callable[[str], Path]) -> None:
    found = azure(shared_data("azure-llm-2023") / "AzureLLMInferenceTrace_conv.csv.gz", 0, Scale())
    assert len(found) == 19_366
    assert statistics.mean(prompt_lengths(found)) == pytest.approx(1154.7, abs=0.1)
    assert found[-1].at_s == pytest.approx(3502, abs=1)


def test_real_azure_code_trace_is_bursty(shared_data: Callable[[str], Path]) -> None:
    found = azure(shared_data("azure-llm-2023") / "AzureLLMInferenceTrace_code.csv.gz", 0, Scale())
    times = [one.at_s or 0.0 for one in found]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert len(found) == 8819
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(13.15, abs=0.05)


def test_real_mooncake_conversation_trace(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("mooncake") / "conversation_trace.jsonl.gz"
    found = mooncake(path, 0, Scale())
    times = [one.at_s or 0.0 for one in found]
    assert len(found) == 12_031
    assert statistics.mean(prompt_lengths(found)) == pytest.approx(12_035.1, abs=0.1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert sum(gap == 0 for gap in gaps) == 0
    heads = {one.turns[0].parts[0] for one in found if len(one.turns[0].parts) > 1}
    assert len(heads) == 1  # every request shares block 0


def test_real_length_pairs(shared_data: Callable[[str], Path]) -> None:
    found = length_pairs(shared_data("arxiv-lengths") / "arxiv_summarization_lengths.csv.gz", 0, Scale())
    assert len(found) == 28_257
    assert found[0].at_s is None
    assert statistics.mean(prompt_lengths(found)) == pytest.approx(2588.1, abs=0.1)
