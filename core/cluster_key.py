"""The secret that all processes of one cluster share: it signs tickets and the frames between workers.

It lies in a file that only the user can read, by default in the runtime folder, where the first process makes it.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from .config import Topology
from .errors import ConfigError

KEY_FILE = "cluster.key"
KEY_BYTES = 32


def cluster_key(topology: Topology) -> bytes:
    """The key of the cluster that `topology` describes, 32 bytes. Raises ConfigError for a file that cannot serve."""
    if topology.transfer.key_file is not None:
        return read_key(Path(topology.transfer.key_file))
    if not topology.runtime_dir:
        raise ConfigError("runtime_dir: not set; start through the `penstock` command, or name transfer.key_file")
    path = Path(topology.runtime_dir) / KEY_FILE
    _make_once(path)
    return read_key(path)


def read_key(path: Path) -> bytes:
    """The key in `path`, written as 64 hex digits."""
    try:
        with open(path, encoding="ascii") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigError(f"transfer.key_file: others can read {path}; try `chmod 600 {path}`")
            key = bytes.fromhex(file.read().strip())
    except (OSError, ValueError) as err:
        raise ConfigError(f"transfer.key_file: {path}: {err}") from err
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"transfer.key_file: {path} holds {len(key)} bytes; make one of {KEY_BYTES} with `openssl rand -hex 32`"
        )
    return key


def _make_once(path: Path) -> None:
    """A fresh key unless one is there; whoever comes first wins, and nobody ever sees half of one."""
    if path.exists():
        return
    fresh = path.with_name(f"{KEY_FILE}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")
    try:
        os.link(fresh, path)
    except FileExistsError:
        return
    finally:
        fresh.unlink()
