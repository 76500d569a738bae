"""Every row of docs/PARITY.md, run: disaggregated equals colocated, feature by feature."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.testing import parity

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

CASES = parity.cases(parity.usable_transports())


@pytest.fixture(scope="module")
def matrix(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[parity.Matrix]:
    with parity.real_model(model_path) as (make_engine, tokenizer):
        prompts = parity.conversations(tokenizer.encode_chat)
        yield parity.Matrix(make_engine, prompts, tokenizer, tmp_path_factory.mktemp("kv"))


@pytest.mark.parametrize("case", CASES, ids=[case.feature for case in CASES])
def test_disaggregated_equals_colocated(case: parity.Case, matrix: parity.Matrix) -> None:
    verdict = matrix.run(case)
    assert verdict.happened, "the feature was not in play"
    assert verdict.is_ok, parity.table([verdict])


def test_matrix_notices_a_cache_that_was_changed_on_the_way(matrix: parity.Matrix) -> None:
    """The int8 wire, held to the bar of a lossless one, has to fail: logprobs tell."""
    case = next(case for case in CASES if case.feature == "wire INT8")
    verdict = matrix.run(replace(case, least_equal=1.0, most_apart=parity.LOGPROB_TOLERANCE))
    assert not verdict.is_ok


def test_table_in_the_docs_has_every_case(repo_root: Path) -> None:
    text = (repo_root / "docs" / "PARITY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| \d+ of \d+ \|", text, re.MULTILINE)
    assert rows[: len(parity.cases())] == [case.feature for case in parity.cases()]
    assert "differs" not in text.split("|---|", 1)[1]
