"""Server-sent events from bytes as they arrive, wherever the network cuts them."""

from __future__ import annotations

MAX_EVENT_BYTES = 16 << 20


class EventTooLarge(ValueError):
    """An event that never ends."""


class EventReader:
    """`feed` bytes, get the data of each event that is complete. Comments and other fields are skipped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """Raises EventTooLarge."""
        *whole, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) + self._size > MAX_EVENT_BYTES:
            raise EventTooLarge(f"an event of more than {MAX_EVENT_BYTES} bytes")
        found = []
        for line in whole:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._size += len(line)
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data, self._size = [], 0
        return found

    @property
    def is_inside(self) -> bool:
        """True when an event has begun and not ended."""
        return bool(self._rest.strip() or self._data)
