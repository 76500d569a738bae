"""The digests of a link, of many blocks at once or of none; and the one that speaks for a block in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..kernels.digest.op import digests
from ..kernels.digest.reference import DIGEST_BYTES, block_digest

__all__ = ["DIGEST_BYTES", "Digests", "block_digest", "combined_digest", "digests", "no_digests"]

Digests = Callable[[memoryview, Sequence[tuple[int, int]]], bytes]  # region, (offset, size) → DIGEST_BYTES for each


def no_digests(region: memoryview, places: Sequence[tuple[int, int]]) -> bytes:
    """In place of `digests` on links that do without."""
    return bytes(DIGEST_BYTES * len(places))


def combined_digest(pieces: Iterable[tuple[int, int, bytes]]) -> bytes:
    """One digest for a block that came in pieces (first layer, number of layers, digest), in the order of layers."""
    parts = (first.to_bytes(4, "big") + count.to_bytes(4, "big") + digest for first, count, digest in sorted(pieces))
    return block_digest(b"".join(parts))
