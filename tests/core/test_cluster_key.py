"""The file with the secret that a cluster's processes share."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.cluster_key import KEY_BYTES, KEY_FILE, cluster_key, read_key
from penstock.core.config import Topology, TransferConfig
from penstock.core.errors import ConfigError

RACER = """
import sys
from penstock.core.cluster_key import cluster_key
from penstock.core.config import Topology
print("ready", flush=True)
sys.stdin.readline()
print(cluster_key(Topology(runtime_dir=sys.argv[1])).hex(), flush=True)
"""


def topology(folder: Path) -> Topology:
    return Topology(runtime_dir=str(folder))


def with_key_file(path: Path) -> Topology:
    return replace(Topology(), transfer=TransferConfig(key_file=str(path)))


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    key = cluster_key(topology(tmp_path))
    assert len(key) == KEY_BYTES
    assert cluster_key(topology(tmp_path)) == key
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_keys_of_two_clusters_differ(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert cluster_key(topology(tmp_path / "a")) != cluster_key(topology(tmp_path / "b"))


def test_processes_that_start_together_share_one_key(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        keys = {racer.communicate(timeout=30)[0].strip() for racer in racers}
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert keys == {read_key(tmp_path / KEY_FILE).hex()}
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_what_a_killed_process_left_half_written_is_not_the_key(tmp_path: Path) -> None:
    """The key gets its name when it is whole, so only the nameless half can be cut short."""
    write(tmp_path / f"{KEY_FILE}.{os.getpid()}", "ab" * 7)
    key = cluster_key(topology(tmp_path))
    assert len(key) == KEY_BYTES
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o777])
def test_key_that_others_can_reach_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "key", "ab" * KEY_BYTES, mode)
    with pytest.raises(ConfigError, match=f"others can read {path}; try `chmod 600 {path}`"):
        cluster_key(with_key_file(path))
    path.chmod(0o600)
    assert cluster_key(with_key_file(path)) == b"\xab" * KEY_BYTES


@pytest.mark.parametrize("length", [0, 1, KEY_BYTES - 1, KEY_BYTES + 1])
def test_key_of_another_length_is_refused_with_the_length_and_the_cure(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "key", "ab" * length + "\n")
    with pytest.raises(ConfigError, match=f"holds {length} bytes; make one of 32 with `openssl rand -hex 32`"):
        cluster_key(with_key_file(path))


@pytest.mark.parametrize("text", ["ab" * 31 + "a", "zz" * KEY_BYTES, "0x" + "ab" * KEY_BYTES, "ab" * 31 + "é"])
def test_key_that_is_not_hex_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "key", text)
    with pytest.raises(ConfigError, match=f"transfer.key_file: {path}"):
        cluster_key(with_key_file(path))


def test_named_key_file_that_is_absent_is_refused_and_not_made(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match=f"transfer.key_file: {path}"):
        cluster_key(with_key_file(path))
    assert not path.exists()


def test_without_a_runtime_folder_or_a_named_file_there_is_no_key() -> None:
    with pytest.raises(ConfigError, match="runtime_dir: not set"):
        cluster_key(Topology())
