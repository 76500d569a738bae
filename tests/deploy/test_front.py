"""The front: settings for router and gateway, what it reports, and the whole process without workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.cluster_key import KEY_FILE
from penstock.core.config import ClassConfig, GatewayConfig, ModelConfig, RouterConfig, Topology, dump_topology
from penstock.core.errors import ConfigError, ModelFileError
from penstock.deploy.child import SUPERVISOR_PID
from penstock.deploy.front import StatusDiff, gateway_config, model_window, router_config
from penstock.deploy.reports import ClusterReady, Listening, WorkerChanged, decode_report
from penstock.models import store
from penstock.protocol.messages import WorkerLoad
from penstock.router.interface import ClusterStatus, WorkerStatus


def worker(state: str = "ready", **changes: object) -> WorkerStatus:
    values = {"worker_id": "decode-0", "epoch": "e", "role": "decode", "pid": 7, "state": state, "load": WorkerLoad()}
    counts = {"running": 0, "waiting": 0, "free_blocks": 9, "total_blocks": 9}
    return WorkerStatus(**{**values, **counts, **changes})  # type: ignore[arg-type]


def status(*workers: WorkerStatus, ready: bool = True) -> ClusterStatus:
    return ClusterStatus(ready, "", "least-loaded", list(workers), 0, 0, bytes_per_token=5, max_sequence_tokens=6)


def test_status_is_reported_only_when_something_changed() -> None:
    diff = StatusDiff(Topology())
    starting = diff.changes(status(worker("starting"), ready=False))
    assert [report.state for report in starting if isinstance(report, WorkerChanged)] == ["starting"]
    assert diff.changes(status(worker("starting", free_blocks=3), ready=False)) == []
    ready = diff.changes(status(worker()))
    assert ready[1:] == [ClusterReady("smollm2-135m-instruct", 16, 5, 6)]
    assert diff.changes(status(worker())) == []
    assert len(diff.changes(status(worker(transports={"prefill-0": "shm"})))) == 1


def test_readiness_is_reported_each_time_it_comes_back() -> None:
    diff = StatusDiff(Topology())
    assert [len(diff.changes(status(ready=ready))) for ready in (True, True, False, True)] == [1, 0, 0, 1]


def test_router_settings_come_from_the_topology() -> None:
    topology = replace(
        Topology(),
        router=RouterConfig(
            "round-robin", max_attempts=2, worker_timeout_s=9, unavailable_s=7, target_ttft_s=0.5, target_tpot_s=0.03
        ),
    )
    config = router_config(topology)
    assert (config.policy, config.max_attempts, config.worker_timeout_s) == ("round-robin", 2, 9)
    assert config.unavailable_s == 7
    assert (config.target_ttft_s, config.target_tpot_s) == (0.5, 0.03)
    assert (config.canary, config.canary_idle_s, config.balance_roles) == (True, 60.0, False)
    assert (config.min_prefill, config.min_decode, config.max_worker_streams) == (1, 1, 64)
    assert config.expected_workers == 2


def test_admission_settings_reach_the_router() -> None:
    classes = (ClassConfig("chat", 2.0, 0.5),)
    asked = RouterConfig(
        target_ttft_s=3.0,
        target_tpot_s=0.2,
        classes=classes,
        default_class="chat",
        refuse_late="always",
        max_queued_tokens=77,
        max_promised_blocks=88,
    )
    config = router_config(replace(Topology(), router=asked))
    names = ("target_ttft_s", "target_tpot_s", "classes", "default_class", "refuse_late", "max_queued_tokens")
    for name in (*names, "max_promised_blocks"):
        assert getattr(config, name) == getattr(asked, name)


def test_every_topology_default_is_accepted_by_the_router() -> None:
    router_config(Topology())


@pytest.fixture
def model_path() -> Path:
    try:
        return store.resolve(store.DEFAULT_MODEL, download=False).path
    except ConfigError as err:
        pytest.skip(str(err))


def test_window_is_the_models_unless_the_topology_says_less(model_path: Path) -> None:
    topology = replace(Topology(), model=ModelConfig(str(model_path), name="x", max_model_len=100))
    config = gateway_config(topology)
    assert (config.model_name, config.max_model_len, model_window(model_path)) == ("x", 100, 8192)


def test_broken_config_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="config"):
        model_window(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ModelFileError, match="config"):
        model_window(tmp_path)


def test_front_listens_hears_of_exits_and_ends_on_sigterm(model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "topology.yaml"
    folder = Path(tempfile.mkdtemp(prefix="pv-"))  # a short path
    gateway = GatewayConfig(port=0)
    dump_topology(
        replace(Topology(), model=ModelConfig(str(model_path)), gateway=gateway, runtime_dir=str(folder)), file
    )
    command = [sys.executable, "-m", "penstock", "router", "--topology", str(file)]
    environment = {**os.environ, SUPERVISOR_PID: str(os.getpid())}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as front:
        assert front.stdin is not None
        assert front.stdout is not None
        listening = decode_report(front.stdout.readline())
        assert isinstance(listening, Listening)
        front.stdin.write("nonsense\nexited decode-0 1\n")
        front.stdin.flush()
        with urllib.request.urlopen(f"{listening.url}/status", timeout=30) as answer:
            assert json.load(answer)["workers"] == []
        front.send_signal(signal.SIGTERM)
        _, log = front.communicate(timeout=30)
    assert front.returncode == 0
    assert "the supervisor sent a line that is not" in log
    assert [path.name for path in folder.iterdir()] == [KEY_FILE], "the key is for the workers, who may come later"
    (folder / KEY_FILE).unlink()
    folder.rmdir()
