"""Files of real text become conversations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError
from penstock.loadtest.choices import Sizes, WorkloadChoice
from penstock.loadtest.lengths import Lengths
from penstock.loadtest.prompts import Asked, documents, jsonl, sharegpt, shuffled


def written(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_jsonl_takes_prompts_questions_turns_and_messages(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "one", "output_tokens": 7},
        {"question": "two", "answer": "2"},
        {"turns": ["three", "and then?"], "category": "x", "question_id": 5},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "four"}]},
    )
    found = jsonl(path, Asked(32))
    assert [one.turns[0].parts for one in found] == [("one",), ("two",), ("three",), ("four",)]
    assert [one.turns[0].num_output_tokens for one in found] == [7, 32, 32, 32]
    assert [len(one.turns) for one in found] == [1, 1, 2, 1]
    assert found[2].category == "x"
    assert len(jsonl(path, Asked(32, has_turns=False))[2].turns) == 1


def test_row_without_a_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="row 2: none of `prompt`"):
        jsonl(written(tmp_path, {"prompt": "a"}, {"text": "b"}), Asked())


def test_impossible_answer_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="row 1: an answer of -3 tokens"):
        jsonl(written(tmp_path, {"prompt": "a", "max_tokens": -3}), Asked())


SHARED = [
    {"id": "a", "conversations": [
        {"from": "human", "value": "hello"}, {"from": "gpt", "value": "x" * 40},
        {"from": "human", "value": "more"}, {"from": "gpt", "value": "y" * 8},
    ]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "alone"}]},
    {"id": "c", "conversations": [
        {"from": "system", "value": "s"}, {"from": "human", "value": "late"}, {"from": "gpt", "value": "z"},
    ]},
]  # fmt: skip


@pytest.mark.parametrize("is_list", [True, False])
def test_sharegpt_sends_what_humans_said_with_recorded_lengths(is_list: bool, tmp_path: Path) -> None:
    path = tmp_path / "share.json"
    path.write_text(json.dumps(SHARED, indent=1) if is_list else "\n".join(map(json.dumps, SHARED)))
    found = sharegpt(path, Asked())
    assert [[turn.parts[0] for turn in one.turns] for one in found] == [["hello", "more"], ["late"]]
    assert [turn.num_output_tokens for turn in found[0].turns] == [10, 2]


def test_sharegpt_without_conversations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no conversation"):
        sharegpt(written(tmp_path, SHARED[1]), Asked())


def test_document_is_cut_alike_for_all_its_questions(tmp_path: Path) -> None:
    path = written(tmp_path, {"document": "word " * 1000, "queries": [{"query": "why?"}, "a longer question it is?"]})
    found = documents(path, Asked(16), max_prompt_tokens=200)
    heads = {one.turns[0].parts[0] for one in found}
    assert len(found) == 2
    assert len(heads) == 1
    assert all(one.turns[0].num_prompt_tokens <= 200 for one in found)
    assert str(found[0].turns[0].parts[1]).endswith("Question: why?\nAnswer:")


def test_shuffle_is_a_permutation_by_seed(tmp_path: Path) -> None:
    found = jsonl(written(tmp_path, *({"prompt": str(n)} for n in range(50))), Asked())
    one = shuffled(found, 1)
    assert one == shuffled(found, 1) != shuffled(found, 2)
    assert Counter(str(c.turns[0].parts) for c in one) == Counter(str(c.turns[0].parts) for c in found)


def test_more_requests_than_rows_are_repeated_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a"}, {"prompt": "b"})
    workload = WorkloadChoice("jsonl", path, count=5).build(None, 0, is_chat=True)
    assert [one.turns[0].parts[0] for one in workload.conversations] == ["a", "b", "a", "b", "a"]
    assert workload.num_repeated == 3
    assert workload.is_exact_length is False


def test_repeated_trace_begins_again_after_its_end(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("Timestamp,Request tokens,Response tokens\n0,5,5\n10,5,5\n")
    workload = WorkloadChoice("burstgpt", path, count=5).build(None, 0, is_chat=False)
    assert [one.at_s for one in workload.conversations] == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert workload.is_exact_length is True


def test_workload_of_which_nothing_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of 3 rows fits a window of 100 tokens"):
        WorkloadChoice("random", count=3, is_clipping=False).build(100, 0, is_chat=False)


def test_file_that_is_not_named_is_refused() -> None:
    with pytest.raises(ConfigError, match="read from a file; give its path"):
        WorkloadChoice("azure").build(None, 0, is_chat=False)


@pytest.mark.parametrize(
    ("name", "rows", "two_turns"),
    [
        ("spec-bench/question_open.jsonl.gz", 320, 80),
        ("mt-bench/mt_bench_question.jsonl", 80, 80),
        ("arena-hard/question_v0.1.jsonl.gz", 500, 0),
        ("gsm8k/test.jsonl.gz", 1319, 0),
        ("humaneval/HumanEval.jsonl.gz", 164, 0),
    ],
)
def test_real_prompt_files(name: str, rows: int, two_turns: int, shared_data: Callable[[str], Path]) -> None:
    found = jsonl(shared_data(name), Asked())
    assert len(found) == rows
    assert sum(len(one.turns) == 2 for one in found) == two_turns


def test_real_documents_fit_a_small_window(shared_data: Callable[[str], Path]) -> None:
    choice = WorkloadChoice(
        "documents", shared_data("qmsum-meetings/meetings.jsonl.gz"), sizes=Sizes(output=Lengths(64, 64))
    )
    workload = choice.build(8192, 0, is_chat=True)
    assert len(workload.conversations) == 408
    assert (workload.num_clipped, workload.num_left_out) == (0, 0)
    assert max(one.num_tokens for one in workload.conversations) <= 8192 - 64
    assert len({one.turns[0].parts[0] for one in workload.conversations}) == 58
