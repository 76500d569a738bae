"""What makes two connections one trusted link: a key that only members of the cluster can derive, and a MAC per frame.

session key = MAC(cluster key; hello of the dialer, hello of the listener)      both hellos carry a fresh nonce
proof       = MAC(session key; which side)                                      each side shows it before anything else
frame MAC   = MAC(session key of the direction; number of the frame, body)      no frame is changed or replayed
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from ..core.errors import ProtocolError
from ..protocol.codec import handoff
from ..protocol.messages import HandoffMessage, KvHello

MAC_BYTES = 16
_NUMBER = struct.Struct("<Q")


class Session:
    """One end of a link. One thread at a time calls `seal`, and another `open`."""

    def __init__(self, cluster_key: bytes, dialer: KvHello, listener: KvHello, is_dialer: bool) -> None:
        hellos = [handoff.encode(hello) for hello in (dialer, listener)]
        data = b"".join(len(hello).to_bytes(8, "little") + hello for hello in hellos)
        key = hashlib.blake2b(data, key=cluster_key, digest_size=32, person=b"penstock link").digest()
        keys = [_derive(key, side) for side in (b"dialer", b"listener")]
        self._mine, self._theirs = keys if is_dialer else reversed(keys)
        self.name = _derive(key, b"id")[:16]
        self._sent = self._received = 0

    @property
    def proof(self) -> bytes:
        """What this side shows."""
        return _derive(self._mine, b"proof")[:MAC_BYTES]

    def is_proven(self, proof: bytes) -> bool:
        """Whether the peer knows the cluster's key."""
        return hmac.compare_digest(proof, _derive(self._theirs, b"proof")[:MAC_BYTES])

    def seal(self, message: HandoffMessage) -> bytes:
        """The next frame's body and MAC."""
        body = handoff.encode(message)
        self._sent += 1
        return body + _mac(self._mine, self._sent, body)

    def open(self, data: memoryview) -> HandoffMessage:
        """The message in the next frame; raises ProtocolError when it is not the one the peer has sent now."""
        body, mac = data[:-MAC_BYTES], data[-MAC_BYTES:]
        self._received += 1
        if not hmac.compare_digest(bytes(mac), _mac(self._theirs, self._received, body)):
            raise ProtocolError(f"frame {self._received} of a hand-off link has a wrong MAC; the link ends")
        return handoff.decode(body)


def _derive(key: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(purpose, key=key, digest_size=32).digest()


def _mac(key: bytes, number: int, body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, key=key, digest_size=MAC_BYTES, salt=_NUMBER.pack(number)).digest()
