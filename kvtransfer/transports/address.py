"""Where a worker's hand-off listener is, as one string: "unix:/run/kv-prefill-0.sock,tcp:127.0.0.1:41231"."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import ConfigError, ProtocolError

MAX_UNIX_PATH_BYTES = 107  # sizeof(sun_path) - 1


@dataclass(frozen=True, slots=True)
class KvAddress:
    """Either part may be missing, not both."""

    unix: str | None
    tcp: tuple[str, int] | None

    def __str__(self) -> str:
        parts = [f"unix:{self.unix}"] if self.unix is not None else []
        if self.tcp is not None:
            parts.append(f"tcp:{self.tcp[0]}:{self.tcp[1]}")
        return ",".join(parts)

    @classmethod
    def parse(cls, text: str) -> KvAddress:
        """Raises ProtocolError for anything that `str` does not write."""
        found = re.fullmatch(r"(?:unix:(?P<unix>[^\0]+?))?,?(?:tcp:(?P<host>[^,\0]+):(?P<port>\d{1,5}))?", text)
        if found is None or (found["unix"] is None and found["host"] is None):
            raise ProtocolError(f"hand-off address {text!r}: expected unix:PATH,tcp:HOST:PORT")
        tcp = (found["host"], int(found["port"])) if found["host"] is not None else None
        return cls(found["unix"], tcp)


def require_loopback(host: str) -> None:
    """Raises ConfigError unless `host` is a loopback address: this protocol has no keys of its own."""
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    raise ConfigError(f"hand-off host {host!r} is not a loopback address such as 127.0.0.1; the link is not encrypted")


def socket_path(runtime_dir: Path, worker_id: str) -> Path:
    """This worker's socket, in a directory only this user can enter; raises ConfigError when unsafe or too long."""
    runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = runtime_dir.stat()
    if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigError(
            f"runtime_dir {runtime_dir}: must belong to this user with mode 0700; use another or chmod it"
        )
    path = runtime_dir / f"kv-{re.sub('[^A-Za-z0-9._-]', '_', worker_id)}.sock"
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise ConfigError(f"runtime_dir {runtime_dir}: socket path {path} is longer than {MAX_UNIX_PATH_BYTES} bytes")
    return path
