"""Prompts for measuring speculation, out of a folder with Spec-Bench, HumanEval and QMSum (`spec-bench/`, `humaneval/`,
`qmsum-meetings/`, each as its SOURCE.md describes it).
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

MEETING_WORDS = 700  # of a transcript: a prompt of some 1,200 tokens
_MARKERS = re.compile(r"\{[^}]*\}")


def load_prompts(folder: Path, per_category: int) -> dict[str, list[str]]:
    """Category → user messages, at most `per_category` of each, evenly spread. Raises OSError for a missing file."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in _rows(folder / "spec-bench/question_open.jsonl.gz"):
        found[row["category"] if row["category"] in ("qa", "rag", "math_reasoning") else "mt_bench"] += row["turns"][:1]
    for row in _rows(folder / "humaneval/HumanEval.jsonl.gz"):
        code = row["prompt"] + row["canonical_solution"]
        found["code_editing"].append(f"Add type hints and a comment to each line. Answer with the code.\n\n{code}")
    for row in _rows(folder / "qmsum-meetings/meetings.jsonl.gz"):
        words = _MARKERS.sub("", row["document"]).split(" ")
        found["summarisation"].append(f"Summarise this meeting.\n\n{' '.join(words[:MEETING_WORDS])}")
    return {category: _spread(texts, per_category) for category, texts in sorted(found.items())}


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _spread(texts: list[str], count: int) -> list[str]:
    step = max(1, len(texts) // count)
    return texts[::step][:count]
