"""Spans as messages of bounded size, for libraries that send one buffer at a time.

Both ends cut the same number of bytes at the same places, whatever their spans are. A piece that is contiguous in
memory is a view of it; of other pieces one copy is made, because a message costs such a library more than the copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ..bulk import Span
from .library import PIECE_BYTES, require_inside
from .runs import chunks

Bytes = npt.NDArray[np.uint8]


class Pieces:
    """Pieces of one memory, in one direction: it has a buffer for one piece, so one thread at a time uses it."""

    def __init__(self, region: memoryview, most_bytes: int = PIECE_BYTES) -> None:
        self._bytes: Bytes = np.frombuffer(region, np.uint8)
        self._most_bytes = most_bytes
        self._buffer: Bytes = np.empty(0, np.uint8)

    def cut(self, spans: Sequence[Span]) -> Iterator[list[Span]]:
        """Raises TransferFailed for a span outside the memory."""
        require_inside(list(spans), len(self._bytes), "our")
        return chunks(spans, self._most_bytes)

    def lengths(self, nbytes: int) -> Iterator[int]:
        """Sizes of the pieces of so many bytes, wherever they are."""
        for start in range(0, nbytes, self._most_bytes):
            yield min(self._most_bytes, nbytes - start)

    def to_send(self, piece: list[Span]) -> Bytes:
        """The bytes of a piece; valid until the next call."""
        if len(piece) == 1:
            return self._view(piece[0])
        buffer = self.scratch(sum(span.nbytes for span in piece))
        at = 0
        for span in piece:
            np.copyto(buffer[at : at + span.nbytes], self._view(span))
            at += span.nbytes
        return buffer

    def to_fill(self, piece: list[Span]) -> Bytes:
        """Where a piece is to be received; `place` must follow."""
        return self._view(piece[0]) if len(piece) == 1 else self.scratch(sum(span.nbytes for span in piece))

    def place(self, piece: list[Span], received: Bytes) -> None:
        """Put what was received where it belongs."""
        at = 0
        for span in piece if len(piece) > 1 else []:
            np.copyto(self._view(span), received[at : at + span.nbytes])
            at += span.nbytes

    def scratch(self, nbytes: int) -> Bytes:
        """Bytes that belong to no block; the same ones at each call."""
        if len(self._buffer) < nbytes:
            self._buffer = np.empty(self._most_bytes, np.uint8)
        return self._buffer[:nbytes]

    def close(self) -> None:
        """Let the memory go."""
        self._bytes = self._buffer = np.empty(0, np.uint8)

    def _view(self, span: Span) -> Bytes:
        return self._bytes[span.offset : span.offset + span.nbytes]
