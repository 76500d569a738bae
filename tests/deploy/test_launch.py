"""From a topology to command lines and environments, and the lines between the front and the supervisor."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.config import DecodeConfig, PrefillConfig, Topology
from penstock.deploy.child import SUPERVISOR_PID
from penstock.deploy.launch import available_cores, child_specs, split_threads
from penstock.deploy.ports import port_problem
from penstock.deploy.reports import (
    ClusterReady,
    Listening,
    WorkerChanged,
    decode_report,
    encode_report,
    exited_line,
    parse_exited,
)
from penstock.engine.shared_files import ENVIRONMENT, SharedFiles, inherited_fds


def test_each_process_gets_its_command_and_the_topology_file() -> None:
    topology = replace(Topology(), prefill=PrefillConfig(replicas=2))
    specs = child_specs(topology, Path("/run/p"), {"PATH": "/bin"})
    assert [(spec.name, spec.is_front) for spec in specs] == [
        ("router", True),
        ("prefill-0", False),
        ("prefill-1", False),
        ("decode-0", False),
    ]
    python = (sys.executable, "-P", "-m", "penstock")
    assert specs[0].argv == (*python, "router", "--topology", "/run/p/topology.yaml")
    assert specs[2].argv == (*python, "prefill", "--topology", "/run/p/topology.yaml", "--name", "prefill-1")
    assert all(spec.env["PATH"] == "/bin" and spec.env[SUPERVISOR_PID] == str(os.getpid()) for spec in specs)


def test_colocated_workers_run_the_decode_command() -> None:
    specs = child_specs(replace(Topology(), colocated=True), Path("/run/p"), {})
    assert [spec.name for spec in specs] == ["router", "both-0"]
    assert "decode" in specs[1].argv


def test_threads_go_into_the_environment_of_each_worker() -> None:
    topology = replace(Topology(), decode=DecodeConfig(threads=3))
    router, prefill, decode = child_specs(topology, Path("/run/p"), {})
    assert "OMP_NUM_THREADS" not in router.env
    assert prefill.env["OMP_NUM_THREADS"] == str(available_cores())
    assert decode.env["OMP_NUM_THREADS"] == "3"


@pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")
def test_workers_inherit_the_shared_files_and_the_router_does_not() -> None:
    shared = SharedFiles()
    router, *workers = child_specs(Topology(), Path("/run/p"), {}, shared)
    assert router.inherited == ()
    assert ENVIRONMENT not in router.env
    for worker in workers:
        assert worker.inherited == shared.fds
        assert inherited_fds(worker.env) == shared.fds
    shared.close()
    assert all(spec.inherited == () for spec in child_specs(Topology(), Path("/run/p"), {}))


@pytest.mark.parametrize(("total", "each"), [(1, 1), (2, 1), (5, 2), (8, 4)])
def test_total_threads_are_divided_evenly_with_one_at_least(total: int, each: int) -> None:
    topology = split_threads(Topology(), total)
    assert (topology.prefill.threads, topology.decode.threads) == (each, each)


@pytest.mark.parametrize(
    "report",
    [
        Listening("127.0.0.1", 8000),
        WorkerChanged("decode-0", "decode", 7, "e", "ready", 12, "float32", {"prefill-0": "shm"}),
        ClusterReady("m", 16, 23040, 8192),
    ],
)
def test_report_survives_its_line(report: Listening | WorkerChanged | ClusterReady) -> None:
    line = encode_report(report)
    assert "\n" not in line
    assert decode_report(line) == report


@pytest.mark.parametrize(
    "line", ["", "hello", "{}", '{"type": "Other"}', '{"type": "Listening", "host": 1, "port": 2}']
)
def test_line_that_is_no_report_is_none(line: str) -> None:
    assert decode_report(line) is None


def test_exited_line_survives() -> None:
    assert parse_exited(exited_line("prefill-0", 123) + "\n") == ("prefill-0", 123)


@pytest.mark.parametrize("line", ["", "exited", "exited a", "exited a b", "exited a 1 2", "other a 1", "exited a -1"])
def test_line_that_is_no_exit_is_none(line: str) -> None:
    assert parse_exited(line) is None


def test_port_problem_names_the_reason() -> None:
    assert port_problem("127.0.0.1", 0) is None
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "is taken by another program" in str(port_problem("127.0.0.1", server.getsockname()[1]))
    assert "cannot listen on 192.0.2.1:0" in str(port_problem("192.0.2.1", 0))
