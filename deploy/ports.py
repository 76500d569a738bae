"""Is the port free? Asked before anything is started, so that a taken port costs no start."""

from __future__ import annotations

import errno
import socket


def port_problem(host: str, port: int) -> str | None:
    """One sentence when `host`:`port` cannot be listened on now, else None. Port 0 is any free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror as err:
        return f"{host!r} is not an address of this machine: {err.strerror}"
    except OSError as err:
        if err.errno == errno.EADDRINUSE:
            return f"port {port} on {host} is taken by another program"
        return f"cannot listen on {host}:{port}: {err.strerror}"
    return None
