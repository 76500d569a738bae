"""One role alone: which worker is meant, and what is set up before it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cli.errors import CliError
from penstock.cli.main import main
from penstock.cli.roles import find_worker, role_topology
from penstock.core.config import PrefillConfig, Topology
from penstock.deploy import hosting
from penstock.deploy.runtime_dir import shared_folder


@pytest.mark.parametrize(
    ("command", "name", "is_colocated", "found"),
    [
        ("prefill", None, False, "prefill-0"),
        ("prefill", "prefill-1", False, "prefill-1"),
        ("decode", None, False, "decode-0"),
        ("decode", None, True, "both-0"),
    ],
)
def test_worker_is_found_by_command_and_name(command: str, name: str | None, is_colocated: bool, found: str) -> None:
    topology = replace(Topology(), prefill=PrefillConfig(replicas=2), colocated=is_colocated)
    assert find_worker(topology, command, name).name == found


@pytest.mark.parametrize(
    ("command", "name", "is_colocated", "message"),
    [
        ("prefill", "decode-0", False, "no prefill worker 'decode-0'"),
        ("decode", "decode-1", False, "no decode worker 'decode-1'"),
        ("prefill", None, True, "has no prefill worker"),
    ],
)
def test_worker_that_is_not_there_is_a_usage_error(
    command: str, name: str | None, is_colocated: bool, message: str
) -> None:
    with pytest.raises(CliError, match=message) as caught:
        find_worker(replace(Topology(), colocated=is_colocated), command, name)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.fixture
def topology_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    model = tmp_path / "tiny.gguf"
    model.touch()
    file = tmp_path / "t.yaml"
    file.write_text(f"model: {{source: {model}}}\nprefill: {{threads: 3}}\n", encoding="utf-8")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    yield file
    shared_folder(str(file)).rmdir()


def test_roles_of_one_file_share_a_private_folder_and_a_local_model(topology_file: Path) -> None:
    one, two = role_topology(str(topology_file)), role_topology(str(topology_file))
    assert one == two
    assert Path(one.runtime_dir).stat().st_mode & 0o777 == 0o700
    assert (one.model.source, one.model.served_name) == (str(topology_file.parent / "tiny.gguf"), "tiny")


def test_prefill_command_sets_threads_before_it_runs_the_worker(
    topology_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []

    def run_worker(_: Topology, name: str) -> int:
        seen.append((name, os.environ["OMP_NUM_THREADS"]))
        return 0

    monkeypatch.setattr(hosting, "main", run_worker)
    monkeypatch.setattr("penstock.core.logging.setup_logging", lambda *_: None)
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"})
    assert main(["prefill", "--topology", str(topology_file)]) == 0
    assert seen == [("prefill-0", "3")]


def test_topology_file_that_is_wrong_ends_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("prefil: {}\n", encoding="utf-8")
    assert main(["decode", "--topology", str(file)]) == 2
    assert f'{file}: prefil: unknown key, did you mean "prefill"?' in capsys.readouterr().err
