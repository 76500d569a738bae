"""Workers change their roles while requests run: the same tokens, no error, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.errors import BadRequest
from penstock.protocol.messages import Role
from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import GenerateRequest
from penstock.testing.fake_engine import FakeEngine, expected_tokens
from penstock.testing.inprocess import InProcessCluster


def requests(count: int = 24, first: int = 0) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            f"r{first + i}", list(range(1 + i, 9 + 2 * i)), SamplingParams(max_tokens=20, seed=i, n=1 + i % 2), 60.0
        )
        for i in range(count)
    ]


def check(cluster: InProcessCluster, sent: list[GenerateRequest], results: object) -> None:
    assert isinstance(results, dict)
    for request in sent:
        result = results[request.request_id]
        assert result.error is None, result.error
        expected = [expected_tokens(request.prompt_ids, request.params, c) for c in range(request.params.n)]
        assert [(a.token_ids, a.finish_reason) for a in result.answers] == expected


def roles_of(cluster: InProcessCluster) -> dict[str, Role]:
    return {worker.worker_id: worker.role for worker in cluster.router.status().workers}


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
def test_every_worker_changes_its_role_under_load_without_an_error(transport: str, tmp_path: Path) -> None:
    engines = {name: FakeEngine(num_blocks=200) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")}
    changes: list[tuple[str, Role]] = [
        ("decode-1", "prefill"),
        ("prefill-0", "decode"),
        ("decode-0", "both"),
        ("prefill-1", "decode"),
        ("decode-1", "both"),
    ]
    done: list[str] = []
    turns = 0

    def each_turn(cluster: InProcessCluster) -> None:
        nonlocal turns
        turns += 1
        if turns % 6 == 0 and len(done) < len(changes):
            name, role = changes[len(done)]
            cluster.set_role(name, role)
            done.append(name)
        if turns % 6 == 2:
            cluster._beat()  # the router hears of it in the middle

    with InProcessCluster(engines, transport=transport, runtime_dir=tmp_path, max_batch_tokens=16) as cluster:
        first = requests()
        check(cluster, first, cluster.run(first, each_turn=each_turn))
        assert len(done) == len(changes)
        cluster._beat()
        assert roles_of(cluster) == {
            "prefill-0": "decode",
            "prefill-1": "decode",
            "decode-0": "both",
            "decode-1": "both",
        }
        second = requests(first=100)
        check(cluster, second, cluster.run(second))
        busy = [name for name, worker in cluster.workers.items() if worker.core.snapshot().load.steps]
        assert busy == list(engines), "each of them works in its new role"


@pytest.mark.parametrize("transport", ["inproc", "shm"])
def test_pair_that_swaps_its_roles_hands_over_the_other_way_and_back(transport: str, tmp_path: Path) -> None:
    engines = {"prefill-0": FakeEngine(), "decode-0": FakeEngine()}
    swaps: list[list[tuple[str, Role]]] = [
        [("prefill-0", "decode"), ("decode-0", "prefill")],
        [("decode-0", "decode"), ("prefill-0", "prefill")],
    ]
    with InProcessCluster(engines, transport=transport, runtime_dir=tmp_path, max_batch_tokens=16) as cluster:
        sent = requests(6)
        check(cluster, sent, cluster.run(sent))
        for number, swap in enumerate(swaps, 1):
            before = cluster.router.counters.remote_prefills
            for name, role in swap:
                cluster.set_role(name, role)
                cluster._until(lambda name=name, role=role: _takes(cluster, name, role), 30.0)  # type: ignore[misc]
            cluster._until(lambda: _is_linked(cluster), 30.0)
            sent = requests(6, first=100 * number)
            check(cluster, sent, cluster.run(sent))
            assert cluster.router.counters.remote_prefills == before + 6, "all are handed over again"


def _takes(cluster: InProcessCluster, name: str, role: Role) -> bool:
    cluster._beat()
    return roles_of(cluster)[name] == role


def _is_linked(cluster: InProcessCluster) -> bool:
    cluster._beat()
    return all(worker.transports for worker in cluster.router.status().workers)


def test_last_decode_worker_and_a_stranger_are_refused() -> None:
    with InProcessCluster({"prefill-0": FakeEngine(), "decode-0": FakeEngine()}) as cluster:
        cluster.run(requests(1))
        with pytest.raises(BadRequest, match="the only worker that decodes"):
            cluster.set_role("decode-0", "prefill")
        with pytest.raises(BadRequest, match="is not there; there are: decode-0, prefill-0"):
            cluster.set_role("nobody", "prefill")
        assert roles_of(cluster) == {"prefill-0": "prefill", "decode-0": "decode"}
