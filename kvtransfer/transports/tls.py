"""TLS for the data connection: 1.3 only, and both ends show a certificate of the cluster's own authority.

The names in the certificates are not looked at: a worker is known by its name and epoch on the control connection, and
the authority signs for members of this cluster alone.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: this worker's certificate chain, its private key, and the authority's certificate."""

    certificate: Path
    key: Path
    authority: Path


class Tls:
    """Both ends of TLS connections of one worker."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises ConfigError for a file that is missing or is not what it should be."""
        self._dialer = _context(files, ssl.PROTOCOL_TLS_CLIENT)
        self._listener = _context(files, ssl.PROTOCOL_TLS_SERVER)

    def wrap(self, sock: socket.socket, is_dialer: bool, timeout_s: float) -> ssl.SSLSocket:
        """Shake hands on a connected socket, which is closed when that fails. Raises OSError (ssl.SSLError)."""
        context = self._dialer if is_dialer else self._listener
        try:
            sock.settimeout(timeout_s)
            return context.wrap_socket(sock, server_side=not is_dialer)
        except OSError:
            sock.close()
            raise


def _context(files: TlsFiles, protocol: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(files.certificate, files.key)
        context.load_verify_locations(files.authority)
    except (OSError, ssl.SSLError) as err:
        named = f"certificate {files.certificate}, key {files.key}, authority {files.authority}"
        raise ConfigError(f"TLS files: {err}; given were {named}, all PEM") from err
    return context
