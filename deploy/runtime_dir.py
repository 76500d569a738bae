"""The private folder of one running cluster: its topology file and its sockets. It goes when the cluster goes.

A Unix socket's path may have 107 bytes (103 on macOS), so the folder lies as close to the root as possible. A lock file
tells a living cluster's folder from one that a killed supervisor left; those are removed at the next start.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from ..core.cluster_key import KEY_FILE
from ..core.errors import ConfigError

PREFIX = "penstock-"
TOPOLOGY_FILE = "topology.yaml"
LONGEST_SOCKET_NAME = "kv-prefill-63.sock.partial"
_MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103


class RuntimeDir:
    """A folder with mode 0700, locked while this process lives: `path`, or a new one that goes at the end.

    A context manager; `close` removes what a cluster leaves there and is idempotent. Raises ConfigError for a folder
    that others can enter, that another cluster uses, or whose path is too long.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._is_ours = path is None or not path.exists()
        if path is None:
            base = base_folder()
            remove_stale(base)
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        self.path = named_folder(path)
        self._lock = _take_lock(self.path)

    def close(self) -> None:
        if self._lock < 0:
            return
        if self._is_ours:
            shutil.rmtree(self.path, ignore_errors=True)
        for leaf in (*self.path.glob("*.sock"), self.path / KEY_FILE, self.path / "lock"):
            leaf.unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> RuntimeDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _take_lock(folder: Path) -> int:
    """An open, locked descriptor of `folder`/lock. Locked before it gets that name, so it is never seen unlocked."""
    if (folder / "lock").exists() and not _is_abandoned(folder):
        raise ConfigError(f"runtime_dir: {folder} is in use by another cluster; stop it or use another folder")
    fresh = folder / f"lock.{os.getpid()}"
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fresh.rename(folder / "lock")
    return descriptor


def base_folder() -> Path:
    """$XDG_RUNTIME_DIR when it is a private folder with a short path, else the system's temporary folder, else /tmp."""
    for candidate in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()):
        if (
            candidate
            and os.access(candidate, os.W_OK | os.X_OK)
            and _has_socket_room(Path(candidate) / f"{PREFIX}12345678")
        ):
            return Path(candidate)
    return Path("/tmp")


def shared_folder(topology_file: str) -> Path:
    """The folder of all roles started by hand with the same topology file; made when absent. Raises ConfigError."""
    digest = hashlib.blake2b(os.path.realpath(topology_file).encode(), digest_size=4).hexdigest()
    return named_folder(base_folder() / f"{PREFIX}u{os.getuid()}-{digest}")


def named_folder(path: str | Path) -> Path:
    """The private folder `path`, made when absent. Raises ConfigError when it cannot serve."""
    path = Path(path).absolute()
    check_socket_room(path)
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"runtime_dir: {path}: {err.strerror}") from err
    check_private(path)
    return path


def check_private(path: Path) -> None:
    """Raise ConfigError unless `path` is a folder of ours that nobody else can enter."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"runtime_dir: {path} must be a folder that only you can enter; try `chmod 700 {path}`")


def check_socket_room(path: Path) -> None:
    if not _has_socket_room(path):
        raise ConfigError(
            f"runtime_dir: {path} is too long for Unix sockets in it ({_MAX_SOCKET_PATH} bytes); use a shorter path"
        )


def running_folders(base: Path) -> list[Path]:
    """Folders of living clusters of ours in `base`, by name."""
    return [
        folder
        for folder in sorted(base.glob(f"{PREFIX}*"))
        if (folder / TOPOLOGY_FILE).is_file() and (folder / "lock").is_file() and not _is_abandoned(folder)
    ]


def remove_stale(base: Path) -> list[Path]:
    """Remove folders in `base` whose supervisor is gone; returns them."""
    stale = [
        folder for folder in sorted(base.glob(f"{PREFIX}*")) if (folder / "lock").is_file() and _is_abandoned(folder)
    ]
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
    return stale


def _is_abandoned(folder: Path) -> bool:
    try:
        check_private(folder)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, ConfigError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _has_socket_room(path: Path) -> bool:
    return len(os.fsencode(path / LONGEST_SOCKET_NAME)) <= _MAX_SOCKET_PATH
