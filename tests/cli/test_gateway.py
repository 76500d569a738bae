"""`penstock gateway`: which cluster it joins, and under which name."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.cli.main import main
from penstock.core.config import Topology
from penstock.core.errors import ConfigError
from penstock.deploy import front, runtime_dir
from penstock.testing.serving import free_port


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a cluster that runs: its lock is held."""
    with tempfile.TemporaryDirectory(prefix="p-", dir="/tmp") as base:
        monkeypatch.setattr(runtime_dir, "base_folder", lambda: Path(base))
        folder = Path(base) / "penstock-x"
        folder.mkdir(mode=0o700)
        model = folder / "tiny.gguf"
        model.touch()
        (folder / "topology.yaml").write_text(f"model: {{source: {model}}}\nruntime_dir: {folder}\n", encoding="utf-8")
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
        os.close(lock)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Topology, str]]:
    calls: list[tuple[Topology, str]] = []

    def note(topology: Topology, name: str) -> int:
        calls.append((topology, name))
        return 0

    monkeypatch.setattr(front, "main", note)
    return calls


def test_it_joins_the_only_cluster_under_the_name_of_its_port(
    cluster: Path, started: list[tuple[Topology, str]]
) -> None:
    port = free_port()
    assert main(["gateway", "--port", str(port)]) == 0
    [(topology, name)] = started
    assert name == str(port)
    assert (topology.gateway.port, topology.runtime_dir) == (port, str(cluster))
    assert topology.address_of(name) == f"ipc://{cluster}/router-{port}.sock"


def test_it_joins_the_named_cluster_under_the_given_name(cluster: Path, started: list[tuple[Topology, str]]) -> None:
    assert main(["gateway", "--join", str(cluster), "--port", "0", "--name", "blue"]) == 0
    assert [name for _, name in started] == ["blue"]


def test_without_a_cluster_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime_dir, "base_folder", lambda: tmp_path)
    assert main(["gateway", "--port", "0"]) == 1
    assert "clusters that run here: none" in capsys.readouterr().err
    assert main(["gateway", "--port", "0", "--join", str(tmp_path)]) == 2


def test_name_of_a_living_gateway_is_refused(
    cluster: Path, started: list[tuple[Topology, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(cluster / "router-blue.sock"))
        living.listen()
        assert main(["gateway", "--port", "0", "--name", "blue"]) == 2
    assert "runs on this cluster already" in capsys.readouterr().err
    assert main(["gateway", "--port", "0", "--name", "blue"]) == 0, "its socket was left behind"
    assert len(started) == 1


@pytest.mark.parametrize("name", ["", "Blue", "a" * 15, "../x"])
def test_name_that_makes_no_socket_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="router name"):
        Topology(runtime_dir="/run/p").address_of(name)
