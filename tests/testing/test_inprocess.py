"""The one-thread cluster with the fake engine, over every transport:

the quick twin of the parity tests with a model.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import GenerateRequest
from penstock.testing.fake_engine import FakeEngine, expected_tokens
from penstock.testing.inprocess import InProcessCluster


def requests() -> list[GenerateRequest]:
    return [
        GenerateRequest(f"r{i}", list(range(1, 2 + i)), SamplingParams(max_tokens=7, seed=i, n=1 + i % 3), 60.0)
        for i in range(12)
    ]


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
def test_cluster_disaggregated_gives_the_expected_tokens(transport: str, tmp_path: Path) -> None:
    engines = {"prefill-0": FakeEngine(), "decode-0": FakeEngine()}
    with InProcessCluster(engines, transport=transport, runtime_dir=tmp_path, max_batch_tokens=8) as cluster:
        results = cluster.run(requests())
        assert cluster.router.counters.remote_prefills == len(results)
    for request in requests():
        answers = results[request.request_id].answers
        expected = [expected_tokens(request.prompt_ids, request.params, c) for c in range(request.params.n)]
        assert [(a.token_ids, a.finish_reason) for a in answers] == expected


def test_cluster_colocated_gives_the_expected_tokens() -> None:
    with InProcessCluster({"both-0": FakeEngine(num_blocks=24)}, max_batch_tokens=8) as cluster:
        results = cluster.run(requests())
    for request in requests():
        answers = results[request.request_id].answers
        expected = [expected_tokens(request.prompt_ids, request.params, c) for c in range(request.params.n)]
        assert [(a.token_ids, a.finish_reason) for a in answers] == expected
