"""The private folder of a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.errors import ConfigError
from penstock.deploy import runtime_dir
from penstock.deploy.runtime_dir import RuntimeDir, base_folder, named_folder, remove_stale, shared_folder


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(runtime_dir, "_MAX_SOCKET_PATH", 4096)  # pytest's folders are long
    return tmp_path


def test_runtime_dir_is_private_and_gone_after_close(base: Path) -> None:
    with RuntimeDir() as folder:
        assert folder.path.parent == base
        assert folder.path.stat().st_mode & 0o777 == 0o700
        (folder.path / "router.sock").touch()
    assert list(base.iterdir()) == []
    folder.close()


def test_named_runtime_dir_that_was_there_keeps_foreign_files(base: Path) -> None:
    named = base / "mine"
    named.mkdir(mode=0o700)
    (named / "notes").touch()
    with RuntimeDir(named) as folder:
        (folder.path / "router.sock").touch()
    assert [leaf.name for leaf in named.iterdir()] == ["notes"]


def test_runtime_dir_in_use_is_refused(base: Path) -> None:
    with RuntimeDir(base / "mine"), pytest.raises(ConfigError, match="in use by another cluster"):
        RuntimeDir(base / "mine")
    with RuntimeDir(base / "mine"):
        pass


def test_runtime_dir_open_to_others_is_refused(base: Path) -> None:
    named = base / "open"
    named.mkdir()
    named.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        RuntimeDir(named)
    link = base / "link"
    link.symlink_to(base)
    with pytest.raises(ConfigError, match="only you can enter"):
        named_folder(link)


def test_folder_of_a_dead_cluster_is_removed_and_a_living_one_stays(base: Path) -> None:
    dead = base / "penstock-dead"
    dead.mkdir(mode=0o700)
    (dead / "lock").touch()
    (dead / "router.sock").touch()
    (base / "penstock-no-lock").mkdir()
    with RuntimeDir(base / "penstock-alive") as alive:
        assert remove_stale(base) == [dead]
        assert alive.path.is_dir()
    assert [leaf.name for leaf in base.iterdir()] == ["penstock-no-lock"]


def test_path_too_long_for_a_socket_is_refused_with_the_limit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long for Unix sockets"):
        named_folder(tmp_path / ("x" * 100))


def test_base_folder_falls_back_when_the_preferred_one_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere/at/all")
    monkeypatch.setenv("TMPDIR", "/nowhere/either")
    assert base_folder().is_dir()


def test_roles_with_the_same_topology_file_share_a_folder(base: Path) -> None:
    one, again, other = (
        shared_folder(str(base / name)) for name in ("a.yaml", "../" + base.name + "/a.yaml", "b.yaml")
    )
    assert one == again != other
    assert one.stat().st_mode & 0o777 == 0o700
