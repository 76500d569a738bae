"""The second connection of a tcp link, which carries bytes: opened by the dialer, brought to its link by a token.

With TLS set up, both ends shake hands on it as soon as the token is over; a peer without a certificate of the same
authority gets no further.
"""

from __future__ import annotations

import socket

from ..core.errors import ProtocolError
from ..core.ids import IdSource
from ..protocol.messages import Peer
from .identity import Identity
from .transports.address import KvAddress
from .transports.tcp import Rendezvous, tune
from .transports.wire import send_frame


def open_data(me: Identity, peer: Peer, token: bytes, timeout_s: float, ids: IdSource) -> socket.socket:
    """The dialer's end. Raises OSError (ssl.SSLError), or ProtocolError for a peer without a tcp address."""
    address = KvAddress.parse(peer.kv_address)
    if address.tcp is None:
        raise ProtocolError(f"{peer.worker_id} has no tcp address")
    data = socket.create_connection(address.tcp, timeout_s)
    try:
        tune(data, bulk=True)
        send_frame(data, me.hello(peer.epoch, ("tcp",), ids.token(16), token))
        return _ready(data, me, is_dialer=True, timeout_s=timeout_s)
    except OSError:
        data.close()
        raise


def deliver(data: socket.socket, me: Identity, token: bytes, rendezvous: Rendezvous, timeout_s: float) -> None:
    """The listener's end: hand the connection to the link that waits for it. Raises OSError or ProtocolError."""
    tune(data, bulk=True)
    if not rendezvous.deliver(token, _ready(data, me, is_dialer=False, timeout_s=timeout_s)):
        raise ProtocolError("a data connection with an unknown token")


def _ready(data: socket.socket, me: Identity, is_dialer: bool, timeout_s: float) -> socket.socket:
    """Encrypted where that is set up; from now on reads and writes block, and the link's end wakes them."""
    if me.tls is not None:
        data = me.tls.wrap(data, is_dialer, timeout_s)
    data.settimeout(None)
    return data
