"""A whole cluster of stand-in processes: readiness, restart with news, signals, and what is left afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.clock import MonotonicClock
from penstock.core.config import Topology, load_topology
from penstock.deploy import cluster
from penstock.deploy.child import child_environment
from penstock.deploy.cluster import ChildExited, Cluster, News, Stopping
from penstock.deploy.reports import ClusterReady, Listening, encode_report
from penstock.deploy.supervisor import ChildSpec, StartFailed
from penstock.engine.shared_files import SharedFiles

READY = ClusterReady("m", 16, 1, 1)
FRONT = f"""
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
print('a stray line', flush=True)
print({encode_report(Listening("127.0.0.1", 4321))!r}, flush=True)
print({encode_report(READY)!r}, flush=True)
signal.sigwait({{signal.SIGTERM}})
"""


class Audience:
    """Remembers the news; `react` may act on each."""

    def __init__(self, react: Callable[[News], None]) -> None:
        self.heard: list[News] = []
        self._react = react

    def tell(self, news: News) -> None:
        self.heard.append(news)
        self._react(news)


def child(name: str, code: str, *, is_front: bool = False) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-S", "-c", code), child_environment(os.environ, {}), is_front)


def run_cluster(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    react: Callable[[Cluster, News], None],
    worker: str = "import signal; signal.pause()",
) -> list[News]:
    specs = [child("router", FRONT, is_front=True), child("decode-0", worker)]
    monkeypatch.setattr(cluster, "child_specs", lambda topology, folder, shared: specs)

    async def run() -> list[News]:
        audience = Audience(lambda news: react(subject, news))
        subject = Cluster(replace(Topology(), runtime_dir=str(folder)), folder, audience, MonotonicClock())
        await subject.run()
        assert subject.supervisor.pids() == {}
        return audience.heard

    return asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_drains_the_cluster(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def react(subject: Cluster, news: News) -> None:
        if isinstance(news, ClusterReady):
            os.kill(os.getpid(), number)

    assert run_cluster(tmp_path, monkeypatch, react) == [Listening("127.0.0.1", 4321), READY, Stopping()]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_port_that_the_system_chose_is_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def react(subject: Cluster, news: News) -> None:
        if isinstance(news, ClusterReady):
            subject.stop()

    run_cluster(tmp_path, monkeypatch, react)
    assert load_topology(tmp_path / "topology.yaml").gateway.port == 4321


def test_dead_worker_is_news_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[ChildExited] = []

    def react(subject: Cluster, news: News) -> None:
        match news:
            case ClusterReady():
                os.kill(subject.supervisor.pids()["decode-0"], signal.SIGKILL)
            case ChildExited():
                exits.append(news)
                subject.stop()

    run_cluster(tmp_path, monkeypatch, react)
    assert [(exit.name, exit.restart_in_s) for exit in exits] == [("decode-0", 0.2)]


def test_worker_that_dies_before_readiness_fails_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FRONT", "import sys; sys.stdin.read()")
    with pytest.raises(StartFailed, match="decode-0 ended during start: exit code 5"):
        run_cluster(tmp_path, monkeypatch, lambda subject, news: None, worker="raise SystemExit(5)")


@pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")
def test_one_pool_is_made_with_the_cluster_and_gone_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SharedFiles | None] = []
    specs = [child("router", FRONT, is_front=True)]

    def child_specs(topology: Topology, folder: Path, shared: SharedFiles | None) -> list[ChildSpec]:
        made.append(shared)
        return specs

    monkeypatch.setattr(cluster, "child_specs", child_specs)

    async def run(topology: Topology) -> None:
        def react(news: News) -> None:
            if isinstance(news, ClusterReady):
                subject.stop()

        subject = Cluster(topology, tmp_path, Audience(react), MonotonicClock())
        await subject.run()

    topology = replace(Topology(), runtime_dir=str(tmp_path))
    asyncio.run(run(topology))
    asyncio.run(run(replace(topology, transfer=replace(topology.transfer, one_pool=True))))
    assert made[0] is None
    assert isinstance(made[1], SharedFiles)
    for fd in made[1].fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
