"""Bytes ↔ messages.

A frame that does not decode is a ProtocolError with a path to the field, and nothing else happens.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from ..core.errors import ProtocolError
from .messages import FromRouter, FromWorker, HandoffMessage

MAX_FRAME_BYTES = 64 << 20

T = TypeVar("T")


class Codec(Generic[T]):
    """Encoder and decoder of one message family."""

    def __init__(self, family: Any, name: str) -> None:
        self._name = name
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(family)

    def encode(self, message: T) -> bytes:
        return self._encoder.encode(message)

    def decode(self, frame: bytes | memoryview) -> T:
        """The message in `frame`; raises ProtocolError for anything that is not exactly one."""
        if len(frame) > MAX_FRAME_BYTES:
            raise ProtocolError(f"{self._name} frame: {len(frame)} bytes, the bound is {MAX_FRAME_BYTES}")
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise ProtocolError(f"{self._name} frame of {len(frame)} bytes: {err}") from err


from_router: Codec[FromRouter] = Codec(FromRouter, "router")
from_worker: Codec[FromWorker] = Codec(FromWorker, "worker")
handoff: Codec[HandoffMessage] = Codec(HandoffMessage, "hand-off")
